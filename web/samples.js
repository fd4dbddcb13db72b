// Inputs to try.

import { $ } from "./view.js";

/**
 * Offers the samples that lie beside the page.
 * @param {(name: string, open: () => Promise<File>) => void} take Called with the one that is chosen.
 */
export async function showSamples(take) {
  const response = await fetch("samples/index.json");
  if (!response.ok) return;
  const names = await response.json();
  $("samples").querySelector("ul").replaceChildren(...names.map((name) => {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button" });
    const picture = Object.assign(document.createElement("img"), { src: `samples/${name}`, alt: name.replace(/\.png$/, "") });
    button.append(picture);
    button.addEventListener("click", () => take(name, async () => new File([await (await fetch(picture.src)).blob()], name)));
    item.append(button);
    return item;
  }));
  $("samples").hidden = names.length === 0;
}
