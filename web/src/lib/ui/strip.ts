import { diverging } from '../colors';

/** A vector as an image one pixel high, to be stretched: blue below zero, orange above. */
export function stripUrl(values: number[], dark: boolean, largest = largestOf(values)): string {
  const canvas = document.createElement('canvas');
  canvas.width = values.length;
  canvas.height = 1;
  const context = canvas.getContext('2d')!;
  values.forEach((value, x) => {
    context.fillStyle = diverging(value / (largest || 1), dark);
    context.fillRect(x, 0, 1, 1);
  });
  return canvas.toDataURL();
}

export function largestOf(values: number[]): number {
  return values.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
}
