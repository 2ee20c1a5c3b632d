/** Pictures and pages as files: what is on the screen, with every style it needs inside. */

const STYLES = [
  'fill',
  'fill-opacity',
  'stroke',
  'stroke-width',
  'stroke-opacity',
  'stroke-dasharray',
  'stroke-linecap',
  'stroke-linejoin',
  'opacity',
  'font-family',
  'font-size',
  'font-weight',
  'font-variant-numeric',
  'text-anchor',
  'dominant-baseline',
  'letter-spacing',
  'paint-order',
  'visibility',
  'display',
  'image-rendering',
  'marker-start',
  'marker-end',
];
const MARGIN = 24;
const SVG = 'http://www.w3.org/2000/svg';

/** The pictures of a section, one below the other, as one stand-alone SVG document. */
export function toSvg(section: HTMLElement, title: string): string {
  const parts = [...section.querySelectorAll<SVGSVGElement | HTMLCanvasElement>('[data-save]')];
  const boxes = parts.map((part) => part.getBoundingClientRect());
  const left = Math.min(...boxes.map((box) => box.left));
  const top = Math.min(...boxes.map((box) => box.top));
  const width = Math.max(...boxes.map((box) => box.right)) - left + 2 * MARGIN;
  const heading = 44;
  const height = Math.max(...boxes.map((box) => box.bottom)) - top + heading + 2 * MARGIN;

  const style = getComputedStyle(document.documentElement);
  const svg = element('svg', { xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}` });
  svg.append(element('rect', { width, height, fill: style.backgroundColor }));
  const text = element('text', {
    x: MARGIN,
    y: MARGIN + 18,
    fill: style.color,
    'font-family': style.fontFamily,
    'font-size': 20,
    'font-weight': 650,
  });
  text.textContent = title;
  svg.append(text);
  parts.forEach((part, i) => {
    const place = {
      x: boxes[i].left - left + MARGIN,
      y: boxes[i].top - top + MARGIN + heading,
      width: boxes[i].width,
      height: boxes[i].height,
    };
    if (part instanceof HTMLCanvasElement) {
      svg.append(element('image', { ...place, href: part.toDataURL() }));
    } else {
      const copy = withStyles(part);
      for (const [name, value] of Object.entries(place)) copy.setAttribute(name, String(value));
      svg.append(copy);
    }
  });
  return new XMLSerializer().serializeToString(svg);
}

/** The same as a PNG, at twice the size for sharp print. */
export async function toPng(section: HTMLElement, title: string): Promise<Blob> {
  const image = new Image();
  image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(toSvg(section, title));
  await image.decode();
  const canvas = document.createElement('canvas');
  canvas.width = 2 * image.width;
  canvas.height = 2 * image.height;
  canvas.getContext('2d')!.drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(blob!), 'image/png'));
}

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

/** A copy of a picture whose colours and fonts no longer depend on the page's style sheets. */
function withStyles(svg: SVGSVGElement): SVGSVGElement {
  const copy = svg.cloneNode(true) as SVGSVGElement;
  const originals = svg.querySelectorAll('*');
  copy.querySelectorAll('*').forEach((node, i) => {
    const style = getComputedStyle(originals[i]);
    for (const name of STYLES) {
      const value = style.getPropertyValue(name);
      if (value && !(name === 'display' && value === 'inline')) node.setAttribute(name, value);
    }
    node.removeAttribute('class');
    node.removeAttribute('style');
  });
  copy.querySelectorAll('[data-moving], foreignObject').forEach((node) => node.remove());
  return copy;
}

function element(name: string, attributes: Record<string, string | number>): SVGElement {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, String(value));
  return node;
}
