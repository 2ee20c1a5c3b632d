/** Places of the experts in the flow picture, and the lines that lead through them. */
import type { LayerStep } from '../../lib/types';
import { left, right, type Box, type Point } from './layout';

export interface Line {
  /** Null for the shared experts. */
  expert: number | null;
  /** What the expert's answer is multiplied by; 1 for the shared ones. */
  weight: number;
  /** Share of the lengths of what routed and shared experts answer; of the routed, by weight. */
  share: number;
  place: Point;
  path: string;
}

export interface ExpertsDrawing {
  places: Point[];
  radius: number;
  router: Point;
  shared: Box;
  sum: Point;
  lines: Line[];
}

const ROUTER = { offset: 20, radius: 13 };
const SUM_RADIUS = 12;

export function drawExperts(box: Box, experts: number, step: LayerStep): ExpertsDrawing {
  const columns = Math.ceil(Math.sqrt(experts));
  const rows = Math.ceil(experts / columns);
  const room = { w: Math.min(box.w - 130, 1.25 * (box.h - 50)), h: box.h - 50 };
  const pitch = { x: room.w / columns, y: room.h / rows };
  const radius = Math.min(7.5, 0.4 * Math.min(pitch.x, pitch.y));
  const router = { x: box.x + ROUTER.offset, y: left(box).y };
  const sum = { x: right(box).x - SUM_RADIUS, y: left(box).y };
  const middle = (router.x + sum.x) / 2;
  const places = Array.from({ length: experts }, (_, id) => ({
    x: middle - room.w / 2 + ((id % columns) + 0.5) * pitch.x,
    y: box.y + (Math.floor(id / columns) + 0.5) * pitch.y,
  }));
  const shared = { x: middle - 44, y: box.y + box.h - 34, w: 88, h: 26 };
  const chosen = apart(step.topk_ids.map((id) => places[id]), 2 * radiusOf(experts, radius));
  const total = step.topk_weights.reduce((a, b) => a + b, 0) || 1;
  const lines: Line[] = step.topk_ids.map((expert, i) => ({
    expert,
    weight: step.topk_weights[i],
    share: ((1 - step.shared_share) * step.topk_weights[i]) / total,
    place: chosen[i],
    path: through(router, chosen[i], sum),
  }));
  lines.push({
    expert: null,
    weight: 1,
    share: step.shared_share,
    place: { x: middle, y: shared.y + shared.h / 2 },
    path: through(left(box), { x: middle, y: shared.y + shared.h / 2 }, sum),
  });
  return { places, radius, router, shared, sum, lines };
}

/** Radius of a chosen expert, which has to hold its number. */
export const radiusOf = (experts: number, radius: number) => Math.max(radius, experts > 99 ? 11 : 8.5);

/** Places of the chosen, neighbours in a row pushed apart so that each can be read. */
function apart(places: Point[], distance: number): Point[] {
  const moved = places.map((place) => ({ ...place }));
  const inOrder = moved.toSorted((a, b) => a.x - b.x);
  inOrder.forEach((place, i) => {
    for (const other of inOrder.slice(0, i)) {
      const near = Math.abs(other.y - place.y) < distance * 0.8 && place.x - other.x < distance;
      if (near) place.x = other.x + distance;
    }
  });
  return moved;
}

export const strokeOf = (line: Line) => 1 + 16 * line.share;

function through(from: Point, by: Point, to: Point): string {
  const out = (by.x - from.x) * 0.5;
  const back = (to.x - by.x) * 0.5;
  return (
    `M${from.x},${from.y}C${from.x + out},${from.y} ${by.x - out},${by.y} ${by.x},${by.y}` +
    `C${by.x + back},${by.y} ${to.x - back},${to.y} ${to.x},${to.y}`
  );
}
