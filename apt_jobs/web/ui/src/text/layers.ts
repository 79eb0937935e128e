/** A layer's name without what all names share: "model.layers.3.mlp.up_proj.weight" is "layers.3.mlp.up_proj". */
export function shortLayer(name: string): string {
  return name.replace(/^model\./, "").replace(/\.weight$/, "");
}
