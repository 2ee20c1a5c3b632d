// After `vite build`: the page in both languages, with its first screen and that screen's style
// inside, so that the first paint waits for nothing but the HTML.
import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { build } from 'vite';

const PAGE = '../src/moescope/server/page';
const LANGUAGES = { en: 'en', zh: 'zh-CN' };

await build({
  logLevel: 'warn',
  build: { ssr: 'src/prerender.ts', outDir: 'node_modules/.prerender', emptyOutDir: true },
});
const { firstScreen } = await import('./node_modules/.prerender/prerender.js');

const template = readFileSync(`${PAGE}/index.html`, 'utf-8');
const [link, href] = template.match(/<link rel="stylesheet"[^>]*href="\.\/([^"]+)"[^>]*>/);
const style = readFileSync(`${PAGE}/${href}`, 'utf-8');
for (const [language, tag] of Object.entries(LANGUAGES)) {
  const start = `<link rel="preload" as="fetch" crossorigin href="./api/start/${language}" />`;
  const page = template
    .replace('<html lang="en">', `<html lang="${tag}">`)
    .replace(link, () => `${start}\n    <style>${style}</style>`)
    .replace('<div id="app"></div>', () => `<div id="app">${firstScreen(language)}</div>`);
  writeFileSync(`${PAGE}/index.${language}.html`, page);
}
rmSync(`${PAGE}/index.html`);
rmSync(`${PAGE}/${href}`);
