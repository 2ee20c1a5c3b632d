import { hydrate, mount } from 'svelte';
import App from './App.svelte';
import './app.css';

const target = document.getElementById('app')!;
// The build renders the first screen into the HTML; the development server does not.
(target.firstElementChild ? hydrate : mount)(App, { target });
