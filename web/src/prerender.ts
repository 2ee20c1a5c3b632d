/** The first screen as HTML, before anything is known of a model: what the build puts into the page. */
import { render } from 'svelte/server';
import App from './App.svelte';
import { i18n, type Language } from './lib/i18n.svelte';

export function firstScreen(language: Language): string {
  i18n.language = language;
  return render(App).body;
}
