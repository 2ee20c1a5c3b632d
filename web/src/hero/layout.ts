/** Where the four boxes of the first picture stand, beside or below each other. */
import type { Box, Point } from '../stations/flow/layout';

export type Part = 'input' | 'router' | 'experts' | 'output';

export interface HeroLayout {
  wide: boolean;
  height: number;
  boxes: Record<Part, Box>;
  lights: Point[];
  radius: number;
  shared: Box;
  router: Point;
  /** Where the experts' answers come together. */
  sum: Point;
  /** From box to box, and back to the beginning. */
  wires: string[];
  again: string;
}

const TITLE = 30;

export function heroLayout(width: number, experts: number): HeroLayout {
  return width >= 760 ? besides(width, experts) : below(width, experts);
}

function besides(width: number, experts: number): HeroLayout {
  const height = 312;
  const middle = 142;
  const input = { x: 1, y: 60, w: Math.min(210, width * 0.19), h: 164 };
  const output = { x: width - input.w - 1, y: 60, w: input.w, h: 164 };
  const router = { x: input.x + input.w + 44, y: 84, w: 116, h: 116 };
  const start = router.x + router.w + 74;
  const grid = { x: start, y: 2, w: output.x - 74 - start, h: 280 };
  const { lights, radius } = place(
    { x: grid.x + 14, y: grid.y + TITLE + 2, w: grid.w - 28, h: grid.h - TITLE - 52 },
    experts,
    Math.ceil(Math.sqrt(experts)),
  );
  return {
    wide: true,
    height,
    boxes: { input, router, experts: grid, output },
    lights,
    radius,
    shared: { x: grid.x + 14, y: grid.y + grid.h - 40, w: grid.w - 28, h: 28 },
    router: { x: router.x + router.w, y: middle },
    sum: { x: output.x, y: middle },
    wires: [`M${input.x + input.w},${middle}H${router.x}`],
    again: `M${output.x + output.w / 2},${output.y + output.h}V${height - 12}H${input.x + input.w / 2}V${input.y + input.h + 5}`,
  };
}

function below(width: number, experts: number): HeroLayout {
  const x = 1;
  const w = width - 26;
  const input = { x, y: 1, w, h: 56 };
  const router = { x, y: 75, w, h: 42 };
  const columns = Math.max(8, Math.ceil(Math.sqrt(experts * 4)));
  const rows = Math.ceil(experts / columns);
  const area = Math.max(64, Math.min(96, rows * 20));
  const grid = { x, y: 149, w, h: area + TITLE + 38 };
  const { lights, radius } = place({ x: x + 8, y: grid.y + TITLE - 2, w: w - 16, h: area }, experts, columns);
  const output = { x, y: grid.y + grid.h + 32, w, h: 56 };
  const edge = width - 8;
  return {
    wide: false,
    height: output.y + output.h + 2,
    boxes: { input, router, experts: grid, output },
    lights,
    radius,
    shared: { x: x + 10, y: grid.y + grid.h - 32, w: w - 20, h: 24 },
    router: { x: x + w / 2, y: router.y + router.h },
    sum: { x: x + w / 2, y: output.y },
    wires: [`M${x + w / 2},${input.y + input.h}V${router.y}`],
    again: `M${x + w},${output.y + output.h / 2}H${edge}V${input.y + input.h / 2}H${x + w + 5}`,
  };
}

function place(area: Box, experts: number, columns: number) {
  const rows = Math.ceil(experts / columns);
  const pitch = { x: area.w / columns, y: area.h / rows };
  return {
    lights: Array.from({ length: experts }, (_, id) => ({
      x: area.x + ((id % columns) + 0.5) * pitch.x,
      y: area.y + (Math.floor(id / columns) + 0.5) * pitch.y,
    })),
    radius: Math.max(2, Math.min(11, 0.46 * Math.min(pitch.x, pitch.y))),
  };
}

/** A line from one point to another, bent along the way that the boxes follow. */
export function bent(from: Point, to: Point, wide: boolean): string {
  const x = (to.x - from.x) / 2;
  const y = (to.y - from.y) / 2;
  return wide
    ? `M${from.x},${from.y}C${from.x + x},${from.y} ${to.x - x},${to.y} ${to.x},${to.y}`
    : `M${from.x},${from.y}C${from.x},${from.y + y} ${to.x},${to.y - y} ${to.x},${to.y}`;
}
