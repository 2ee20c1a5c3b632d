/** How much may be asked for at once. */
import declared from './declared.json';

/** Characters of a prompt that the server takes. */
export const MAX_TEXT = declared.max_text;
/** Tokens that are made unless the reader asks for another number. */
export const MAX_TOKENS = 48;
/** Tokens that the reader may ask for. */
export const MOST_TOKENS = 128;
