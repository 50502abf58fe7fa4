// A sound: play, waveform, mel picture, playhead; one sound at a time.

let playing = null;

class Player {
  constructor(clip) {
    this.clip = clip;
    const source = clip.src ?? clip.href;
    this.note = el("p", { class: "quiet", role: "status" });
    if (clip.note) this.note.append(visible(clip.note));
    if (source)
      this.audio = el("audio", {
        src: source,
        preload: clip.src ? "metadata" : "none",
        on: {
          play: () => this.started(),
          pause: () => this.show(),
          ended: () => this.show(),
          timeupdate: () => this.show(),
          loadedmetadata: () => this.show(),
          error: () => this.failed(),
        },
      });
    this.toggleButton = button("▶", () => this.toggle(), {
      class: "play",
      "aria-label": `play ${visible(clip.name)}`,
      disabled: !source,
    });
    this.time = el("span", { class: "time" });
    this.head = el("div", { class: "head" });
    this.canvas = el("canvas", { class: "wave", height: 56, "aria-hidden": "true" });
    const mel = clip.mel
      ? el("img", {
          class: "mel",
          src: clip.mel.png,
          alt: `mel spectrogram: ${clip.mel.frames} frames of ${clip.mel.bins} bins`,
        })
      : null;
    this.track = el(
      "div",
      {
        class: "track",
        tabindex: source ? 0 : null,
        role: "slider",
        "aria-label": "position in the sound",
        "aria-valuemin": 0,
        on: {
          click: (event) => this.seek(event.offsetX / this.track.clientWidth),
          keydown: (event) => this.key(event),
        },
      },
      clip.peaks ? this.canvas : null,
      mel,
      this.head,
    );
    if (!clip.peaks && !mel) this.track.classList.add("bare");
    const from = clip.src || clip.note ? "" : clip.href ? "linked, not embedded" : "not here";
    this.node = el(
      "div",
      { class: "player" },
      this.audio,
      this.toggleButton,
      el(
        "div",
        { class: "sound" },
        el(
          "div",
          { class: "sound-name" },
          said("span", "", clip.name),
          el("span", { class: "quiet" }, from),
          this.time,
        ),
        this.track,
        this.note,
      ),
    );
    new ResizeObserver(() => this.drawWave()).observe(this.node);
    this.show();
  }

  get seconds() {
    return Number.isFinite(this.audio?.duration) ? this.audio.duration : this.clip.seconds || 0;
  }

  toggle() {
    if (!this.audio) return;
    if (this.audio.paused) this.audio.play().catch((error) => this.failed(error));
    else this.audio.pause();
  }

  started() {
    if (playing && playing !== this) playing.audio.pause();
    playing = this;
    const frame = () => {
      this.show();
      if (!this.audio.paused && this.node.isConnected) requestAnimationFrame(frame);
      else this.audio.pause();
    };
    frame();
  }

  failed(error) {
    if (error?.name === "AbortError") return;
    this.note.textContent = visible(
      this.clip.src
        ? "this browser cannot decode the sound"
        : `the sound is not where the run left it: ${this.clip.href}`,
    );
    this.toggleButton.disabled = true;
  }

  seek(share) {
    if (this.audio && this.seconds) this.audio.currentTime = Math.min(Math.max(share, 0), 0.999) * this.seconds;
    this.show();
  }

  key(event) {
    if (event.key === " ") {
      event.preventDefault();
      this.toggle();
    }
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!move || !this.audio) return;
    event.preventDefault();
    event.stopPropagation();
    this.seek((this.audio.currentTime + move) / this.seconds);
  }

  show() {
    const at = this.audio?.currentTime || 0;
    this.onShow?.(at);
    this.head.style.left = `${this.seconds ? (100 * at) / this.seconds : 0}%`;
    this.time.textContent = this.seconds ? `${clock(at)} / ${clock(this.seconds)}` : "";
    this.toggleButton.textContent = this.audio && !this.audio.paused ? "❚❚" : "▶";
    this.track.setAttribute("aria-valuemax", this.seconds.toFixed(1));
    this.track.setAttribute("aria-valuenow", at.toFixed(1));
  }

  drawWave() {
    const { peaks } = this.clip,
      width = this.track.clientWidth;
    if (!peaks || !width) return;
    const scale = window.devicePixelRatio || 1,
      height = 56,
      canvas = this.canvas;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.fillStyle = cssColor("--accent");
    const slices = peaks.length >> 1,
      loudest = peaks.reduce((most, peak) => Math.max(most, Math.abs(peak)), 1);
    const zoom = (height / 2 - 2) / Math.max(loudest, 24);
    for (let x = 0; x < width; x++) {
      const first = Math.floor((x * slices) / width),
        end = Math.max(first + 1, Math.floor(((x + 1) * slices) / width));
      let low = 127,
        high = -127;
      for (let i = first; i < end; i++) {
        low = Math.min(low, peaks[2 * i]);
        high = Math.max(high, peaks[2 * i + 1]);
      }
      pen.fillRect(x, height / 2 - high * zoom, 1, Math.max((high - low) * zoom, 1));
    }
  }
}
