// The wait for the networks, with one bar over all that is fetched.

import { $ } from "./view.js";

const PATIENCE = 300; // ms without a bar

/** Loads an engine, and shows how far that is. */
export class Loader {
  /** @param {Engine} engine What is loaded. */
  constructor(engine) {
    this.engine = engine;
    engine.addEventListener("progress", () => this.#show());
  }

  #show() {
    const { done, whole } = this.engine.progress;
    const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
    $("progress").value = done / whole;
    $("progress-text").textContent = `Fetching the networks: ${megabytes(done)} of ${megabytes(whole)} MB, once`;
    if (done < whole) return;
    $("progress").removeAttribute("value"); // how long this takes is not known
    $("progress-text").textContent = "Starting the networks";
  }

  /** Fetches and starts the networks, once however often it is called. */
  async load() {
    const timer = setTimeout(() => ($("loading").hidden = false), PATIENCE);
    try {
      await this.engine.load();
    } finally {
      clearTimeout(timer);
      $("loading").hidden = true;
    }
  }

  /** Does so while the visitor looks around, unless data are dear; gives the reason if it fails. */
  async prefetch() {
    if (navigator.connection?.saveData) return "";
    try {
      await this.load();
      return "";
    } catch (error) {
      return `The networks cannot start: ${error.message}.`;
    }
  }
}
