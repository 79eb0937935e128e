// Puts lines of different steps on one axis, as uPlot wants them.
import uPlot from "uplot";

/** All lines of both over the steps of either; null where one has no value. */
export function joinByStep(left: uPlot.AlignedData, right: uPlot.AlignedData): uPlot.AlignedData {
  if (right[0].length === 0)
    return [...left, ...right.slice(1).map(() => Array.from(left[0], () => null))] as uPlot.AlignedData;
  return uPlot.join([left, right]);
}
