/** Where everything stands in the flow picture, wide or narrow; the drawing itself is the same. */

export interface Point {
  x: number;
  y: number;
}

export interface Box extends Point {
  w: number;
  h: number;
}

export interface Layout {
  width: number;
  height: number;
  tokens: Box;
  embedding: Box;
  layer: Box;
  attention: Box;
  experts: Box;
  guess: Box;
  /** The stream that every block reads from and adds to. */
  stream: string;
  /** The detours: out of the stream into a block, and back. */
  attentionIn: string;
  attentionOut: string;
  expertsIn: string;
  expertsOut: string;
  /** Where the detours join again. */
  joins: Point[];
  /** The picked token's way back to the beginning, and where that is said. */
  again: { path: string; label: Point & { anchor: 'middle' | 'end' } };
  /** Where it is said that blocks add to the stream. */
  note: Point;
  /** What a moving token travels, part by part; the experts' own lines lie between the two. */
  journey: { toExperts: string; fromExperts: string };
}

export function layout(width: number): Layout {
  return width >= 820 ? wide(width) : narrow(width);
}

export const left = (box: Box): Point => ({ x: box.x, y: box.y + box.h / 2 });
export const right = (box: Box): Point => ({ x: box.x + box.w, y: box.y + box.h / 2 });

function wide(width: number): Layout {
  const stream = 318;
  const tokens = { x: 2, y: 96, w: 94, h: 200 };
  const embedding = { x: 134, y: 96, w: 34, h: 200 };
  const guess = { x: width - 206, y: 96, w: 206, h: 200 };
  const layer = { x: 204, y: 30, w: guess.x - 40 - 204, h: 326 };
  const attention = { x: layer.x + 36, y: 96, w: Math.min(210, layer.w * 0.31), h: 170 };
  const begin = attention.x + attention.w + 50;
  const experts = { x: begin, y: 62, w: layer.x + layer.w - 30 - begin, h: 238 };
  const start = { x: embedding.x + embedding.w / 2, y: embedding.y + embedding.h };
  const end = { x: guess.x + 24, y: stream };
  const detour = (box: Box) => {
    const from = { x: box.x - 16, y: stream };
    const to = { x: box.x + box.w + 16, y: stream };
    return {
      in: [from, { x: from.x, y: left(box).y }, left(box)],
      out: [right(box), { x: to.x, y: left(box).y }, to],
    };
  };
  const a = detour(attention);
  const e = detour(experts);
  const corner = { x: start.x, y: stream };
  const top = { x: end.x, y: guess.y + guess.h };
  return {
    width,
    height: 408,
    tokens,
    embedding,
    layer,
    attention,
    experts,
    guess,
    stream: rounded([start, corner, end, top]),
    attentionIn: rounded(a.in),
    attentionOut: rounded(a.out),
    expertsIn: rounded(e.in),
    expertsOut: rounded(e.out),
    joins: [a.out[2], e.out[2]],
    again: {
      path: rounded([
        { x: guess.x + guess.w - 60, y: guess.y + guess.h + 4 },
        { x: guess.x + guess.w - 60, y: 384 },
        { x: tokens.x + tokens.w / 2, y: 384 },
        { x: tokens.x + tokens.w / 2, y: tokens.y + tokens.h + 8 },
      ]),
      label: { x: width / 2, y: 402, anchor: 'middle' },
    },
    note: { x: layer.x + 16, y: stream + 24 },
    journey: {
      toExperts: rounded([right(tokens), left(embedding), { x: start.x, y: left(embedding).y }, corner, ...a.in, ...a.out, ...e.in]),
      fromExperts: rounded([...e.out, end, top]),
    },
  };
}

function narrow(width: number): Layout {
  const stream = 14;
  const tokens = { x: 0, y: 34, w: width, h: 34 };
  const embedding = { x: 0, y: 110, w: width, h: 22 };
  const layer = { x: 0, y: 176, w: width, h: 534 };
  const attention = { x: 44, y: 232, w: width - 70, h: 150 };
  const experts = { x: 44, y: 436, w: width - 70, h: 230 };
  const guess = { x: 0, y: 764, w: width, h: 190 };
  const start = { x: stream, y: embedding.y + embedding.h };
  const end = { x: stream, y: guess.y - 24 };
  const detour = (box: Box) => {
    const edge = box.x + box.w + 14;
    const below = box.y + box.h + 12;
    return {
      in: [{ x: stream, y: left(box).y }, left(box)],
      out: [right(box), { x: edge, y: left(box).y }, { x: edge, y: below }, { x: stream, y: below }],
    };
  };
  const a = detour(attention);
  const e = detour(experts);
  return {
    width,
    height: 990,
    tokens,
    embedding,
    layer,
    attention,
    experts,
    guess,
    stream: rounded([start, end]),
    attentionIn: rounded(a.in),
    attentionOut: rounded(a.out),
    expertsIn: rounded(e.in),
    expertsOut: rounded(e.out),
    joins: [a.out[3], e.out[3]],
    again: {
      path: rounded([
        { x: 60, y: guess.y + guess.h + 2 },
        { x: 60, y: 974 },
        { x: width - 1.5, y: 974 },
        { x: width - 1.5, y: tokens.y + tokens.h + 6 },
      ]),
      label: { x: width - 8, y: 968, anchor: 'end' },
    },
    note: { x: 30, y: layer.y + layer.h - 11 },
    journey: {
      toExperts: rounded([start, ...a.in, ...a.out, ...e.in]),
      fromExperts: rounded([...e.out, end]),
    },
  };
}

/** A path through points with round corners. */
function rounded(points: Point[], radius = 12): string {
  const [first, ...rest] = points;
  let path = `M${first.x},${first.y}`;
  rest.forEach((point, i) => {
    const next = rest[i + 1];
    if (!next) {
      path += `L${point.x},${point.y}`;
      return;
    }
    const before = towards(point, i === 0 ? first : rest[i - 1], radius);
    const after = towards(point, next, radius);
    path += `L${before.x},${before.y}Q${point.x},${point.y} ${after.x},${after.y}`;
  });
  return path;
}

function towards(from: Point, to: Point, distance: number): Point {
  const length = Math.hypot(to.x - from.x, to.y - from.y) || 1;
  const share = Math.min(distance, length / 2) / length;
  return { x: from.x + (to.x - from.x) * share, y: from.y + (to.y - from.y) * share };
}
