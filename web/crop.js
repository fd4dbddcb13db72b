// The square that is cut from a picture: dragged, zoomed by corner, slider or keyboard, or that of a face.

const STEP = 0.02; // of the shorter side, for one press of an arrow key
const ZOOM = 1.08; // for one press of + or -
const SETTLED = 120; // ms without a further change before the rest of the page follows

/**
 * The crop tool. Dispatches "input" whenever the square moves, "change" once a new square stands still. The square of a face may be turned, and leave the
 * picture, as in FFHQ; any other is upright and within.
 */
export class Crop extends EventTarget {
  /**
   * @param {HTMLElement} stage Holds the picture's canvas and the box.
   * @param {HTMLElement} box The square, focusable; holds elements with data-corner "nw", "ne", "sw" or "se".
   * @param {HTMLInputElement} slider How close the square is, to the right closer.
   */
  constructor(stage, box, slider) {
    super();
    Object.assign(this, { stage, box, slider, canvas: stage.querySelector("canvas"), width: 0, height: 0, least: 4 });
    box.addEventListener("pointerdown", (event) => this.#grab(event));
    box.addEventListener("keydown", (event) => this.#key(event));
    slider.addEventListener("input", () => this.#resizeTo(this.#sizeOf(1 - Number(slider.value))));
  }

  /**
   * Shows a picture, its largest square in the centre chosen.
   * @param {ImageBitmap} picture The picture.
   * @param {number} least The smallest square in pixels.
   */
  show(picture, least) {
    const n = Math.min(picture.width, picture.height);
    const [x, y] = [Math.floor((picture.width - n) / 2), Math.floor((picture.height - n) / 2)];
    Object.assign(this, { width: picture.width, height: picture.height, least, x, y, n, angle: 0, framed: false });
    const scale = Math.min(1, 1024 / Math.max(picture.width, picture.height));
    this.canvas.width = Math.max(1, Math.round(picture.width * scale));
    this.canvas.height = Math.max(1, Math.round(picture.height * scale));
    this.canvas.getContext("2d").drawImage(picture, 0, 0, this.canvas.width, this.canvas.height);
    this.stage.style.setProperty("--ratio", picture.width / picture.height);
    this.stage.classList.toggle("pixels", Math.max(picture.width, picture.height) < 160);
    this.slider.disabled = this.#largest() <= least;
    this.#place();
  }

  /** The square: left, top and side in whole pixels of the picture, then turned about its centre by an angle. */
  get square() {
    return { x: this.x, y: this.y, n: this.n, angle: this.angle, framed: this.framed };
  }

  /** Takes an earlier square, or that of a face; no "change" follows. */
  set square({ framed = true, ...square }) {
    clearTimeout(this.timer);
    this.release?.(); // what is dragged is let go
    Object.assign(this, square, { framed });
    this.#place();
  }

  #largest() {
    return Math.min(this.width, this.height) * (this.framed ? 2 : 1);
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
      rotate: `${this.angle}rad`,
    });
    const range = Math.log(this.#largest() / this.least);
    this.slider.value = range > 0 ? 1 - Math.log(this.n / this.least) / range : 0;
    this.slider.setAttribute("aria-valuetext", `${this.n} of ${this.#largest()} pixels`);
    this.box.setAttribute("aria-label", `Crop: ${this.n} pixels square, ${this.x} from the left, ${this.y} from the top`);
  }

  #moved() {
    this.#place();
    clearTimeout(this.timer);
    this.dispatchEvent(new Event("input"));
    this.timer = setTimeout(() => this.dispatchEvent(new Event("change")), SETTLED);
  }

  #moveTo(x, y) {
    const beyond = this.framed ? this.n / 2 : 0;
    const place = (value, whole) => Math.round(Math.min(Math.max(value, -beyond), whole - this.n + beyond));
    const [left, top] = [place(x, this.width), place(y, this.height)];
    if (left === this.x && top === this.y) return;
    [this.x, this.y] = [left, top];
    this.#moved();
  }

  /** Changes the side, and keeps a point of the square, as shares of it, where it is. */
  #resizeTo(n, anchorX = 0.5, anchorY = 0.5) {
    n = Math.round(Math.min(Math.max(n, this.least), this.#largest()));
    if (n === this.n) return;
    const half = (this.n - n) / 2;
    const [dx, dy] = this.#turned((2 * anchorX - 1) * half, (2 * anchorY - 1) * half, this.angle);
    const [x, y] = [this.x + half + dx, this.y + half + dy];
    this.n = n;
    this.x = this.y = NaN; // so that moving there counts, wherever it was
    this.#moveTo(x, y);
  }

  #turned(x, y, angle) {
    const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
    return [cos * x - sin * y, sin * x + cos * y];
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
    const from = { pageX: event.pageX, pageY: event.pageY, ...this.square };
    const move = (now) => {
      const moved = [(now.pageX - from.pageX) * this.#scale(), (now.pageY - from.pageY) * this.#scale()];
      if (!corner) return this.#moveTo(from.x + moved[0], from.y + moved[1]);
      const [dx, dy] = this.#turned(...moved, -from.angle);
      const [right, bottom] = [corner.includes("e"), corner.includes("s")];
      const longer = ((right ? dx : -dx) + (bottom ? dy : -dy)) / 2;
      const roomX = right ? this.width - from.x : from.x + from.n;
      const roomY = bottom ? this.height - from.y : from.y + from.n;
      const room = from.framed ? Infinity : Math.min(roomX, roomY);
      this.#resizeTo(Math.min(from.n + longer, room), right ? 0 : 1, bottom ? 0 : 1);
    };
    this.release = () => this.box.removeEventListener("pointermove", move);
    this.box.addEventListener("pointermove", move);
    this.box.addEventListener("pointerup", this.release, { once: true });
    this.box.addEventListener("pointercancel", this.release, { once: true });
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
}
