/** What the reader changed about the router, as a request says it. */
import declared from './declared.json';
import type { ExpertId, SteeringRequest } from './types';

/** The model as it is. */
export const NO_STEERING = declared.steering as SteeringRequest;

export type Rule = NonNullable<SteeringRequest['rule']>;
export const RULES = declared.rules as Rule[];

export const MAX_NOISE = declared.max_noise;

export function isSteered(steering: SteeringRequest): boolean {
  return JSON.stringify(steering) !== JSON.stringify(NO_STEERING);
}

/** The same experts but for `id`, which joins them or leaves them. */
export function toggled(experts: ExpertId[], id: ExpertId): ExpertId[] {
  const others = experts.filter((other) => !isSame(other, id));
  return others.length < experts.length ? others : [...experts, id];
}

export const isSame = (a: ExpertId, b: ExpertId): boolean => a.layer === b.layer && a.expert === b.expert;
