// Before and after in one place: a line to drag, and a magnifier that follows the pointer.

const ZOOMS = [1, 2, 4];

/** Makes a .compare element work: its range input moves the line. */
export function makeCompare(element) {
  const slider = element.querySelector("input");
  const follow = () => element.style.setProperty("--split", `${slider.value}%`);
  slider.addEventListener("input", follow);
  element.addEventListener("pointermove", ({ clientX, clientY }) => {
    const { left, top, width, height } = element.getBoundingClientRect();
    element.style.setProperty("--x", `${(100 * (clientX - left)) / width}%`);
    element.style.setProperty("--y", `${(100 * (clientY - top)) / height}%`);
  });
  follow();
}

/** Enlarges what a .compare element shows to the next step, and names it on the button. */
export function zoomNext(element, button) {
  const now = ZOOMS.indexOf(Number(element.style.getPropertyValue("--zoom") || 1));
  const zoom = ZOOMS[(now + 1) % ZOOMS.length];
  element.style.setProperty("--zoom", zoom);
  button.textContent = `Zoom ${zoom}×`;
}
