/** The stations' pictures by the names of their files; they load together, after the first screen. */
import type { Component } from 'svelte';

const found = import.meta.glob<{ default: Component }>('./*.svelte', { eager: true });

export const pictureOf = (file: string): Component => found[`./${file}.svelte`].default;
