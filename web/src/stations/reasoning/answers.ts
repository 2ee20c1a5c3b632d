/** What an answer of the replay consists of, and whether it is right. */
import type { ReasoningHistory } from '../../lib/types';

type Snapshot = ReasoningHistory['runs'][number]['snapshots'][number];

/** The thought, its lines in one row, and what stands behind it. */
export function parted(text: string): { thought: string; answer: string } {
  const end = text.lastIndexOf('</think>');
  const told = end < 0 ? text : text.slice(0, end);
  const thought = told.startsWith('<think>') ? told.slice('<think>'.length) : '';
  const answer = end < 0 ? (thought ? '' : text) : text.slice(end + '</think>'.length);
  return { thought: thought.trim().split('\n').join(' · '), answer: answer.trim() };
}

/** Whether the answer to a question is right at a checkpoint. */
export const rightAt = (snapshot: Snapshot, question: number): boolean =>
  snapshot.answers[question].reward >= 1;
