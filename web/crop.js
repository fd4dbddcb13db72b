// The square that is cut from a picture: dragged, zoomed by wheel, corner, slider or keyboard.

const STEP = 0.02; // of the shorter side, for one press of an arrow key
const ZOOM = 1.08; // for one press of + or -, or one notch of a wheel
const SETTLED = 120; // ms without a further change before the rest of the page follows

/** The crop tool. Dispatches "change" once a new square stands still. */
export class Crop extends EventTarget {
  /**
   * @param {HTMLElement} stage Holds the picture's canvas and the box.
   * @param {HTMLElement} box The square, focusable; holds elements with data-corner "nw", "ne", "sw" or "se".
   * @param {HTMLInputElement} slider How much of the picture the square takes.
   */
  constructor(stage, box, slider) {
    super();
    Object.assign(this, { stage, box, slider, canvas: stage.querySelector("canvas"), width: 0, height: 0, least: 4 });
    box.addEventListener("pointerdown", (event) => this.#grab(event));
    box.addEventListener("keydown", (event) => this.#key(event));
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    slider.addEventListener("input", () => this.#resizeTo(this.#sizeOf(Number(slider.value))));
  }

  /**
   * Shows a picture, its largest square in the centre chosen.
   * @param {ImageBitmap} picture The picture.
   * @param {number} least The smallest square in pixels.
   */
  show(picture, least) {
    Object.assign(this, { width: picture.width, height: picture.height, least });
    this.n = Math.min(picture.width, picture.height);
    this.x = Math.floor((picture.width - this.n) / 2);
    this.y = Math.floor((picture.height - this.n) / 2);
    const scale = Math.min(1, 1024 / Math.max(picture.width, picture.height));
    this.canvas.width = Math.max(1, Math.round(picture.width * scale));
    this.canvas.height = Math.max(1, Math.round(picture.height * scale));
    this.canvas.getContext("2d").drawImage(picture, 0, 0, this.canvas.width, this.canvas.height);
    this.stage.style.setProperty("--ratio", picture.width / picture.height);
    this.stage.classList.toggle("pixels", Math.max(picture.width, picture.height) < 160);
    this.slider.disabled = this.#largest() <= least;
    this.#place();
  }

  /** The square: left, top and side in whole pixels of the picture. */
  get square() {
    return { x: this.x, y: this.y, n: this.n };
  }

  #largest() {
    return Math.min(this.width, this.height);
  }

  /** The slider runs evenly over the logarithm: each step looks alike. */
  #sizeOf(share) {
    return this.least * (this.#largest() / this.least) ** share;
  }

  #place() {
    const percent = (value, whole) => `${(100 * value) / whole}%`;
    Object.assign(this.box.style, {
      left: percent(this.x, this.width),
      top: percent(this.y, this.height),
      width: percent(this.n, this.width),
      height: percent(this.n, this.height),
    });
    const range = Math.log(this.#largest() / this.least);
    this.slider.value = range > 0 ? Math.log(this.n / this.least) / range : 1;
    this.slider.setAttribute("aria-valuetext", `${this.n} of ${this.#largest()} pixels`);
    this.box.setAttribute("aria-label", `Crop: ${this.n} pixels square, ${this.x} from the left, ${this.y} from the top`);
  }

  #moved() {
    this.#place();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.dispatchEvent(new Event("change")), SETTLED);
  }

  #moveTo(x, y) {
    const place = (value, whole) => Math.round(Math.min(Math.max(value, 0), whole - this.n));
    const [left, top] = [place(x, this.width), place(y, this.height)];
    if (left === this.x && top === this.y) return;
    [this.x, this.y] = [left, top];
    this.#moved();
  }

  /** Changes the side, and keeps a point of the square, as shares of it, where it is. */
  #resizeTo(n, anchorX = 0.5, anchorY = 0.5) {
    n = Math.round(Math.min(Math.max(n, this.least), this.#largest()));
    if (n === this.n) return;
    const [x, y] = [this.x + (this.n - n) * anchorX, this.y + (this.n - n) * anchorY];
    this.n = n;
    this.x = this.y = -1; // so that moving there counts, wherever it was
    this.#moveTo(x, y);
  }

  /** Pixels of the picture in one pixel of the screen. */
  #scale() {
    return this.width / this.canvas.getBoundingClientRect().width;
  }

  #grab(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.box.focus({ preventScroll: true });
    this.box.setPointerCapture(event.pointerId);
    const corner = event.target.dataset.corner;
    const from = { pageX: event.pageX, pageY: event.pageY, x: this.x, y: this.y, n: this.n };
    const move = (now) => {
      const dx = (now.pageX - from.pageX) * this.#scale();
      const dy = (now.pageY - from.pageY) * this.#scale();
      if (!corner) return this.#moveTo(from.x + dx, from.y + dy);
      const [right, bottom] = [corner.includes("e"), corner.includes("s")];
      const longer = ((right ? dx : -dx) + (bottom ? dy : -dy)) / 2;
      const roomX = right ? this.width - from.x : from.x + from.n;
      const roomY = bottom ? this.height - from.y : from.y + from.n;
      return this.#resizeTo(Math.min(from.n + longer, roomX, roomY), right ? 0 : 1, bottom ? 0 : 1);
    };
    const stop = () => {
      this.box.removeEventListener("pointermove", move);
      this.box.classList.remove("dragged");
    };
    this.box.classList.add("dragged");
    this.box.addEventListener("pointermove", move);
    this.box.addEventListener("pointerup", stop, { once: true });
    this.box.addEventListener("pointercancel", stop, { once: true });
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = Math.max(1, this.#largest() * STEP * (event.shiftKey ? 5 : 1));
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key in moves) this.#moveTo(this.x + moves[event.key][0], this.y + moves[event.key][1]);
    else if (event.key === "+" || event.key === "=") this.#resizeTo(Math.min(this.n - 1, this.n / ZOOM));
    else if (event.key === "-") this.#resizeTo(Math.max(this.n + 1, this.n * ZOOM));
    else return;
    event.preventDefault();
  }

  #wheel(event) {
    if (event.ctrlKey) return; // the browser's own zoom
    if (!this.box.matches(":focus, :hover")) return;
    event.preventDefault();
    const n = event.deltaY < 0 ? Math.min(this.n - 1, this.n / ZOOM) : Math.max(this.n + 1, this.n * ZOOM);
    this.#resizeTo(n);
  }
}
