// Exponential moving average with bias correction (Kingma and Ba 2015, section 3): no lag to zero at the beginning.

/** The average after each value with weight `beta` on what came before; values that are not finite are passed over. */
export function ema(values: readonly (number | null)[], beta: number): (number | null)[] {
  let sum = 0;
  let weight = 0; // 1 - beta^t
  return values.map((value) => {
    if (value !== null && Number.isFinite(value)) {
      sum = beta * sum + (1 - beta) * value;
      weight = beta * weight + (1 - beta);
    }
    return weight === 0 ? null : sum / weight;
  });
}
