"use strict";
(() => {
  document.body.classList.add("scripted");
  const table = document.getElementById("cells");
  if (!table) return;
  const body = table.tBodies[0];
  let rows = [...body.rows];
  const byNumber = new Map(rows.map((row) => [row.dataset.number, row]));
  const shown = () => rows.filter((row) => !row.hidden);

  // --- Sort ---
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const isText = header.classList.contains("text");
      const value = (row) => row.cells[column].dataset.value;
      // What is not known comes last, whatever the direction.
      rows.sort((a, b) => (value(a) === "") - (value(b) === "")
        || sign * (isText ? value(a).localeCompare(value(b), "en", { numeric: true }) : Number(value(a)) - Number(value(b))));
      body.append(...rows);
    });
  });

  // --- Filter ---
  const selects = [...document.querySelectorAll("[data-filter]")];
  const frontOnly = document.getElementById("front-only");
  const radios = [...document.querySelectorAll(".metrics input[name='metric']")];
  const points = [...document.querySelectorAll(".point")];
  const status = document.getElementById("status");
  const metric = () => radios.find((radio) => radio.checked)?.value;

  const filter = () => {
    for (const row of rows) {
      const fits = selects.every((select) => select.value === "" || row.dataset[select.dataset.filter] === select.value);
      row.hidden = !fits || (frontOnly?.checked && !row.dataset.front.split(" ").includes(metric()));
    }
    for (const point of points) {
      point.classList.toggle("out", byNumber.get(point.dataset.number).hidden);
    }
    const count = shown().length;
    status.textContent = count === rows.length ? `${count} cells` : `${count} of ${rows.length} cells`;
  };
  [...selects, frontOnly].forEach((control) => control?.addEventListener("change", filter));
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  for (const radio of radios) {
    radio.addEventListener("change", () => {
      document.getElementById("front-of").textContent = radio.nextElementSibling.textContent;
      filter();
    });
  }
  // Browsers may fill a form again as it was before.
  document.querySelector(".filters").reset();
  if (radios.length) radios[0].checked = true;
  const axis = document.querySelector(".metrics input[name='axis']");
  if (axis) axis.checked = true;

  // --- One cell, and its neighbours in the table ---
  const viewer = document.getElementById("viewer");
  const picture = document.getElementById("viewer-picture");
  const numbers = document.getElementById("viewer-numbers");
  const [previous, next] = ["previous", "next"].map((id) => document.getElementById(id));
  let current = null;

  const show = (row) => {
    current = row;
    document.getElementById("viewer-title").textContent = row.dataset.words;
    const found = document.querySelector(`#pictures-${row.dataset.number} img`);
    picture.hidden = !found;
    if (found) {
      picture.src = found.src;
      picture.alt = found.alt;
    }
    numbers.replaceChildren(...[...row.querySelectorAll("[data-label]")].filter((cell) => cell.textContent !== "").map((cell) => {
      const [pair, name, value] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
      name.textContent = cell.dataset.label;
      value.append(...[...cell.childNodes].map((node) => node.cloneNode(true)));
      pair.append(name, value);
      return pair;
    }));
    const others = shown();
    previous.disabled = others.indexOf(row) <= 0;
    next.disabled = others.indexOf(row) === others.length - 1;
    if (!viewer.open) viewer.showModal();
  };
  const move = (by) => {
    const others = shown();
    const row = others[others.indexOf(current) + by];
    if (row) show(row);
  };
  previous.addEventListener("click", () => move(-1));
  next.addEventListener("click", () => move(1));
  document.getElementById("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) move(by);
  });

  body.addEventListener("click", (event) => {
    if (!getSelection().isCollapsed) return; // somebody marks numbers to copy them
    show(event.target.closest("tr"));
  });
  for (const place of [...points, ...document.querySelectorAll(".gallery figure")]) {
    place.addEventListener("click", (event) => {
      event.preventDefault();
      show(byNumber.get(place.dataset.number));
    });
  }
})();
