/**
 * Colours that mean something.
 *
 * An expert has one colour everywhere: sixteen hues, far apart from one id to the next, in four rings
 * of lightness, so that no two of 64 are alike and each can be told apart without its hue. Those that
 * stand side by side or one above the other, in rows of 8, 12, 16 or 32, are furthest apart.
 * Colour never stands alone: a number goes with it.
 */

const HUES = 16;
/** Steps from one id's hue to the next one's; prime to `HUES`. */
const STRIDE = 7;
/** Steps that a ring is turned against the one before. */
const SHIFT = 4;
/** Lightness of the rings; lighter or darker would not stand out against the page. */
const RINGS = [0.52, 0.565, 0.61, 0.66];
const CHROMA = 0.145;

/** Colour of an expert as `#rrggbb`; 3 : 1 or better against the page, light or dark. */
export function expertColor(id: number, n = 64): string {
  const round = Math.floor(id / HUES);
  const ring = round % RINGS.length;
  // Every other ring lies between the hues of its neighbours; beyond 64 the rings come again.
  const turn = (ring % 2) / 2 + (n > 64 ? Math.floor(id / (HUES * RINGS.length)) / 8 : 0);
  const hue = (360 / HUES) * (((id * STRIDE + round * SHIFT) % HUES) + turn) + 250;
  return oklch(RINGS[ring], CHROMA, hue % 360);
}

/** Shared experts are always on and have no colour of their own. */
export const SHARED_COLOR = 'var(--shared)';

/** Sequential scale for heat maps, 0 (the page's ground) to 1 (strongest). */
export function heat(value: number, dark: boolean): string {
  const x = Math.min(1, Math.max(0, value));
  return dark
    ? oklch(0.25 + 0.6 * x, 0.015 + 0.12 * x ** 0.7, 270)
    : oklch(0.965 - 0.56 * x, 0.008 + 0.17 * x ** 0.7, 266);
}

/**
 * Place of a load on that scale, of which `most` is the end. The root leaves room below an even
 * share, where most experts are, however busy the busiest is.
 */
export const heatOf = (load: number, most: number): number =>
  Math.sqrt(Math.min(1, Math.max(0, load / most)));

/** Diverging scale, -1 (blue) over 0 (ground) to 1 (orange). */
export function diverging(value: number, dark: boolean): string {
  const x = Math.min(1, Math.max(-1, value));
  const size = Math.abs(x);
  const hue = x < 0 ? 255 : 55;
  return dark ? oklch(0.27 + 0.5 * size, 0.15 * size, hue) : oklch(0.955 - 0.42 * size, 0.16 * size, hue);
}

/** OKLCH to `#rrggbb`; chroma shrinks until the colour fits into sRGB. */
export function oklch(lightness: number, chroma: number, hue: number): string {
  for (let c = chroma; ; c *= 0.95) {
    const rgb = toLinear(lightness, c, hue);
    if (c < 0.01 || rgb.every((x) => x >= -0.0005 && x <= 1.0005)) {
      return '#' + rgb.map(toHex).join('');
    }
  }
}

function toLinear(lightness: number, chroma: number, hue: number): number[] {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
}

function toHex(linear: number): string {
  const x = Math.min(1, Math.max(0, linear));
  const encoded = x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055;
  return Math.round(255 * encoded)
    .toString(16)
    .padStart(2, '0');
}
