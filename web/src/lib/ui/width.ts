/**
 * No picture is drawn narrower than this: an element that is not laid out yet measures 0, and a
 * drawing of that width would have bars of negative length.
 */
export const LEAST_WIDTH = 240;
