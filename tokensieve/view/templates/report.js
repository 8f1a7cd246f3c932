"use strict";
(() => {
  const buttons = [...document.querySelectorAll("[data-go]")];
  const figures = [...document.querySelectorAll("figure")];
  const dialog = document.querySelector("dialog");
  const large = dialog.querySelector("img");
  const place = dialog.querySelector(".place");
  let state = buttons.find((button) => button.getAttribute("aria-pressed") === "true").dataset.go;
  let open = 0;

  const enlarge = (index) => {
    open = (index + figures.length) % figures.length;
    const picture = figures[open].querySelector(`img[data-state="${state}"]`);
    large.src = picture.src;
    large.alt = picture.alt;
    place.textContent = picture.alt;
  };
  const show = (wanted) => {
    state = wanted;
    for (const part of document.querySelectorAll("[data-state]")) part.hidden = part.dataset.state !== state;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.go === state));
  };

  for (const button of buttons) button.addEventListener("click", () => show(button.dataset.go));
  figures.forEach((figure, index) => {
    figure.querySelector(".open").addEventListener("click", () => {
      enlarge(index);
      dialog.showModal();
    });
  });
  for (const button of dialog.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => {
      const step = Number(button.dataset.step);
      if (step) enlarge(open + step);
      else dialog.close();
    });
  }
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") enlarge(open - 1);
    if (event.key === "ArrowRight") enlarge(open + 1);
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
})();
