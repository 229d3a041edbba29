"use strict";
// Plays both clips in step, with one button and one slider, and draws their difference.
(() => {
  const byId = (id) => document.getElementById(id);
  const clip = JSON.parse(byId("clip-data").textContent);
  const [dense, sparse] = [byId("dense"), byId("sparse")];
  const [play, scrub, canvas] = [byId("play"), byId("scrub"), byId("difference")];
  const figure = byId("difference-figure");
  const brush = canvas.getContext("2d");
  canvas.width = clip.width;
  canvas.height = clip.height;
  scrub.max = clip.frames - 1;

  const frameNow = () => Math.min(clip.frames - 1, Math.floor(dense.currentTime * clip.fps + 1e-3));

  function show() {
    const frame = frameNow();
    scrub.value = frame;
    const psnr = clip.psnr[frame] === null ? "identical" : `PSNR ${clip.psnr[frame].toFixed(1)} dB`;
    const vif = clip.vif.length ? `, VIF ${clip.vif[frame].toFixed(3)}` : "";
    const facts = `Frame ${frame + 1} of ${clip.frames}: ${psnr}, SSIM ${clip.ssim[frame].toFixed(3)}${vif}`;
    byId("frame-facts").textContent = facts;
    scrub.setAttribute("aria-valuetext", facts);
    if (figure.hidden) return;
    brush.globalCompositeOperation = "source-over";
    brush.drawImage(dense, 0, 0, clip.width, clip.height);
    brush.globalCompositeOperation = "difference";
    brush.drawImage(sparse, 0, 0, clip.width, clip.height);
    brush.globalCompositeOperation = "lighter";
    // Adding the picture to itself doubles it: twice makes four times.
    for (let doubling = 0; doubling < 2; doubling++) brush.drawImage(canvas, 0, 0);
  }

  function seek(seconds) {
    for (const video of [dense, sparse]) video.currentTime = seconds;
  }

  async function start() {
    try {
      await Promise.all([dense.play(), sparse.play()]);
    } catch {
      stop(); // The browser wants a click first, or a pause came in between.
    }
  }

  function stop() {
    for (const video of [dense, sparse]) video.pause();
  }

  function follow() {
    if (dense.paused) return;
    if (!dense.ended && !dense.seeking && Math.abs(dense.currentTime - sparse.currentTime) > 1.5 / clip.fps) {
      sparse.currentTime = dense.currentTime;
    }
    show();
    requestAnimationFrame(follow);
  }

  dense.addEventListener("play", () => {
    play.textContent = "Pause";
    play.setAttribute("aria-label", "Pause both clips");
    follow();
  });
  dense.addEventListener("pause", () => {
    play.textContent = "Play";
    play.setAttribute("aria-label", "Play both clips");
  });
  dense.addEventListener("ended", () => {
    seek(0);
    start();
  });
  for (const video of [dense, sparse]) {
    for (const event of ["seeked", "loadeddata"]) video.addEventListener(event, show);
  }
  play.addEventListener("click", () => (dense.paused ? start() : stop()));
  scrub.addEventListener("input", () => {
    stop();
    seek((Number(scrub.value) + 0.5) / clip.fps);
  });
  byId("show-difference").addEventListener("click", (event) => {
    figure.hidden = !figure.hidden;
    event.currentTarget.setAttribute("aria-pressed", String(!figure.hidden));
    show();
  });

  show();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) start();
})();
