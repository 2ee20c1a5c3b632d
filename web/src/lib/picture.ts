/** A station as one stand-alone SVG document: drawings as they are, HTML around them drawn again. */

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
const SVG = 'http://www.w3.org/2000/svg';
const MARGIN = 24;
/** What a picture leaves out: it can only be used on the page. */
const CONTROLS = 'input, select, textarea, .visually-hidden, [data-unsaved]';

/** Title, sentence and picture of a section. */
export function toSvg(section: HTMLElement): string {
  const header = section.querySelector('header')!;
  const picture = section.querySelector<HTMLElement>('[data-picture]') ?? section.querySelector<HTMLElement>('.picture')!;
  const head = header.getBoundingClientRect();
  const body = picture.getBoundingClientRect();
  const root = getComputedStyle(document.documentElement);
  const width = Math.max(reach(picture) - body.left, textEnd(header) - head.left) + 2 * MARGIN;
  const height = head.height + MARGIN + body.height + 2 * MARGIN;
  const svg = element('svg', { xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}` });
  svg.append(element('rect', { width, height, fill: root.backgroundColor }));
  draw(header, svg, MARGIN - head.left, MARGIN - head.top);
  draw(picture, svg, MARGIN - body.left, 2 * MARGIN + head.height - body.top);
  return new XMLSerializer().serializeToString(svg);
}

/** The same as a PNG, at twice the size for sharp print. */
export async function toPng(section: HTMLElement): Promise<Blob> {
  const image = new Image();
  image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(toSvg(section));
  await image.decode();
  const canvas = document.createElement('canvas');
  canvas.width = 2 * image.width;
  canvas.height = 2 * image.height;
  canvas.getContext('2d')!.drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(blob!), 'image/png'));
}

/** The right edge of everything: wide drawings scroll on the page but are saved whole. */
function reach(picture: HTMLElement): number {
  const boxes = [...picture.querySelectorAll('svg')].map((svg) => svg.getBoundingClientRect());
  return Math.max(picture.getBoundingClientRect().right, ...boxes.map((box) => box.right));
}

/** Where the longest line of an element's text ends. */
function textEnd(node: Node): number {
  if (!(node instanceof Text)) return Math.max(0, ...[...node.childNodes].map(textEnd));
  const range = document.createRange();
  range.selectNodeContents(node);
  return range.getBoundingClientRect().right;
}

/** Draw an element and all in it, moved by (dx, dy). */
function draw(node: Element, into: SVGElement, dx: number, dy: number): void {
  const style = getComputedStyle(node);
  if (node.matches(CONTROLS) || style.display === 'none' || style.visibility === 'hidden') return;
  const box = node.getBoundingClientRect();
  const place = { x: box.left + dx, y: box.top + dy, width: box.width, height: box.height };
  if (node instanceof SVGSVGElement) {
    const copy = withStyles(node);
    for (const [name, value] of Object.entries(place)) copy.setAttribute(name, String(value));
    into.append(copy);
    return;
  }
  if (node instanceof HTMLCanvasElement) {
    into.append(element('image', { ...place, href: node.toDataURL() }));
    return;
  }
  drawBox(style, place, into);
  for (const child of node.childNodes) {
    if (child instanceof Text) drawText(child, style, into, dx, dy);
    else if (child instanceof Element) draw(child, into, dx, dy);
  }
}

interface Place {
  x: number;
  y: number;
  width: number;
  height: number;
}

/** Ground and borders of an HTML element. */
function drawBox(style: CSSStyleDeclaration, place: Place, into: SVGElement): void {
  const { x, y, width, height } = place;
  const sides = (['Top', 'Right', 'Bottom', 'Left'] as const).map((side) => ({
    width: style[`border${side}Style`] === 'none' ? 0 : parseFloat(style[`border${side}Width`]),
    color: style[`border${side}Color`],
  }));
  const alike = sides.every((side) => side.width === sides[0].width && side.color === sides[0].color);
  const ground = isVisible(style.backgroundColor) ? style.backgroundColor : 'none';
  const line = alike && sides[0].width > 0 && isVisible(sides[0].color) ? sides[0] : null;
  if (ground !== 'none' || line) {
    const inset = (line?.width ?? 0) / 2;
    into.append(
      element('rect', {
        x: x + inset,
        y: y + inset,
        width: Math.max(0, width - 2 * inset),
        height: Math.max(0, height - 2 * inset),
        rx: Math.min(parseFloat(style.borderTopLeftRadius) || 0, height / 2),
        fill: ground,
        ...(line && { stroke: line.color, 'stroke-width': line.width }),
      }),
    );
  }
  if (alike) return;
  const [top, right, bottom, left] = sides;
  const edges = [
    { side: top, x, y, width, height: top.width },
    { side: right, x: x + width - right.width, y, width: right.width, height },
    { side: bottom, x, y: y + height - bottom.width, width, height: bottom.width },
    { side: left, x, y, width: left.width, height },
  ];
  for (const { side, ...edge } of edges)
    if (side.width > 0 && isVisible(side.color)) into.append(element('rect', { ...edge, fill: side.color }));
}

/** Text of an HTML element, line by line as it is broken on the page. */
function drawText(
  node: Text,
  style: CSSStyleDeclaration,
  into: SVGElement,
  dx: number,
  dy: number,
): void {
  const range = document.createRange();
  let line: { text: string; left: number; middle: number } | null = null;
  const end = () => {
    if (line?.text.trim()) {
      const text = element('text', {
        x: line.left + dx,
        y: line.middle + dy,
        fill: style.color,
        'font-family': style.fontFamily,
        'font-size': style.fontSize,
        'font-weight': style.fontWeight,
        'dominant-baseline': 'central',
        'xml:space': 'preserve',
      });
      text.textContent = line.text;
      into.append(text);
    }
    line = null;
  };
  let at = 0;
  for (const character of node.data) {
    range.setStart(node, at);
    range.setEnd(node, (at += character.length));
    const box = range.getClientRects()[0];
    if (!box || box.width === 0) continue; // white space that is not shown
    const middle = box.top + box.height / 2;
    if (line && Math.abs(line.middle - middle) > box.height / 2) end();
    line ??= { text: '', left: box.left, middle };
    line.text += character === '\n' ? ' ' : character;
  }
  end();
}

const isVisible = (color: string) => !/^rgba\(.*, 0\)$|^transparent$|\/ 0\)$/.test(color);

/** A copy of a drawing whose colours and fonts no longer depend on the page's style sheets. */
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
  copy.setAttribute('overflow', 'visible');
  copy.removeAttribute('class');
  copy.removeAttribute('style');
  return copy;
}

function element(name: string, attributes: Record<string, string | number>): SVGElement {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, String(value));
  return node;
}
