/** Sums with whole numbers, + - × and brackets: to tell whether the model got it right. */

/** The value of such a sum; null where the text is none. */
export function evaluate(text: string): number | null {
  const tokens = text.replace(/[×x]/g, '*').match(/\d+|[-+*()]|\S/g) ?? [];
  let at = 0;

  function sum(): number {
    let value = product();
    while (tokens[at] === '+' || tokens[at] === '-') {
      value = tokens[at++] === '+' ? value + product() : value - product();
    }
    return value;
  }

  function product(): number {
    let value = factor();
    while (tokens[at] === '*') {
      at++;
      value *= factor();
    }
    return value;
  }

  function factor(): number {
    const token = tokens[at++];
    if (token !== '(') return /^\d+$/.test(token ?? '') ? Number(token) : NaN;
    const value = sum();
    return tokens[at++] === ')' ? value : NaN;
  }

  const value = sum();
  return at === tokens.length && Number.isSafeInteger(value) ? value : null;
}
