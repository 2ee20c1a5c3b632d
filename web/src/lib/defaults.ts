/** What the reader has not changed. */
import type { SteeringRequest } from './types';

export const MAX_TOKENS = 48;
/** Tokens that the reader may ask for at once. */
export const MOST_TOKENS = 128;

export const NO_STEERING: SteeringRequest = {
  num_experts_per_tok: null,
  rule: null,
  without_bias: false,
  noise: 0,
  noise_seed: 0,
  bias: [],
  disabled: [],
  forced: [],
};
