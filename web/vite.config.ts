import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vite';

// `npm run dev` serves the page's source and asks a running `moescope open` for everything else.
const server = process.env.MOESCOPE_SERVER ?? 'http://127.0.0.1:8000';

export default defineConfig({
  plugins: [svelte()],
  base: './',
  build: { outDir: '../src/moescope/server/page', emptyOutDir: true, target: 'es2022' },
  server: { proxy: { '/api': server } },
});
