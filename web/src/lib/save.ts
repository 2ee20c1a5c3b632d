/** The page as a file that opens offline, and files for the reader. */

/** The whole page as one HTML file that opens offline: no scripts, no links to files. */
export function toHtml(note: string, link: string): string {
  const page = document.documentElement.cloneNode(true) as HTMLElement;
  const canvases = document.querySelectorAll('canvas');
  page.querySelectorAll('canvas').forEach((canvas, i) => {
    const image = document.createElement('img');
    image.src = canvases[i].toDataURL();
    image.className = canvas.className;
    image.setAttribute('style', canvas.getAttribute('style') ?? '');
    image.width = canvases[i].clientWidth;
    image.height = canvases[i].clientHeight;
    image.alt = canvas.getAttribute('aria-label') ?? '';
    canvas.replaceWith(image);
  });
  freezeFields(page);
  page.querySelectorAll('script, link[rel=stylesheet], link[rel=modulepreload], style, noscript, .no-snapshot').forEach((node) => node.remove());
  const style = document.createElement('style');
  style.textContent = [...document.styleSheets]
    .flatMap((sheet) => [...sheet.cssRules].map((rule) => rule.cssText))
    .concat('button { pointer-events: none }')
    .join('\n');
  page.querySelector('head')!.append(style);
  const banner = document.createElement('p');
  banner.setAttribute('style', 'margin:0;padding:.6rem 1rem;background:var(--accent-soft)');
  const anchor = document.createElement('a');
  anchor.href = anchor.textContent = link;
  anchor.setAttribute('style', 'overflow-wrap:anywhere');
  banner.append(note, ' ', anchor);
  page.querySelector('body')!.prepend(banner);
  return '<!doctype html>\n' + page.outerHTML;
}

export function download(content: string | Blob, name: string, type = ''): void {
  const blob = typeof content === 'string' ? new Blob([content], { type }) : content;
  const anchor = document.createElement('a');
  anchor.href = URL.createObjectURL(blob);
  anchor.download = name;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 10_000);
}

/** What the reader typed and chose lives in properties; in a file it must stand in attributes. */
function freezeFields(page: HTMLElement): void {
  const selector = 'input, textarea, select';
  const live = document.querySelectorAll<HTMLInputElement>(selector);
  page.querySelectorAll<HTMLInputElement>(selector).forEach((field, i) => {
    if (field.tagName === 'TEXTAREA') field.textContent = live[i].value;
    else if (field.tagName === 'SELECT')
      field.querySelectorAll('option').forEach((o) => o.toggleAttribute('selected', o.value === live[i].value));
    else if (field.tagName === 'INPUT') {
      field.setAttribute('value', live[i].value);
      field.toggleAttribute('checked', live[i].checked);
    }
    field.setAttribute('disabled', '');
  });
}
