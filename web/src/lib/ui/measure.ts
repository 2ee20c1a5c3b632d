/** How wide text is in pictures, whose lines the browser does not break. */
import { clip } from '../text';

/** As the page's letters are; a little is added, since bold ones are wider. */
const FAMILY = 'system-ui, sans-serif';
const SPARE = 1.06;

let context: CanvasRenderingContext2D | null = null;

/** Width in pixels of a text in letters of `size` pixels. */
export function widthOf(text: string, size = 14): number {
  context ??= document.createElement('canvas').getContext('2d')!;
  context.font = `${size}px ${FAMILY}`;
  return SPARE * context.measureText(text).width;
}

/** As much of a text as fits into `room` pixels. */
export function fitted(text: string, room: number, size = 14): string {
  for (let length = [...text].length; length > 1; length--) {
    const shortened = clip(text, length);
    if (widthOf(shortened, size) <= room) return shortened;
  }
  return clip(text, 1);
}
