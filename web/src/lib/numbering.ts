/** The number that a station has in the list of contents. */
import { getContext, setContext } from 'svelte';

const NUMBER = Symbol('number');

export const provideNumber = (number: number) => setContext(NUMBER, number);

/** Null outside the numbered stations. */
export const useNumber = () => getContext<number | undefined>(NUMBER) ?? null;
