"use strict";
(() => {
  const table = document.querySelector("table");
  document.body.classList.add("scripted");
  if (!table) return;
  const checks = [...table.tBodies];
  const status = document.getElementById("status");

  const open = (check, is) => {
    check.querySelector(".more").hidden = !is;
    check.querySelector(".open").setAttribute("aria-expanded", is);
  };
  const wrong = checks.filter((check) => ["failed", "error"].includes(check.dataset.show));
  for (const check of checks) {
    open(check, wrong.slice(0, 3).includes(check));
    check.querySelector(".open").addEventListener("click", () => open(check, check.querySelector(".more").hidden));
  }

  const expand = document.getElementById("expand");
  expand.addEventListener("click", () => {
    const is = expand.getAttribute("aria-pressed") === "false";
    expand.setAttribute("aria-pressed", is);
    checks.forEach((check) => open(check, is));
  });

  const filters = [...document.querySelectorAll("nav [data-show]")];
  for (const filter of filters) {
    filter.addEventListener("click", () => {
      const wanted = filter.dataset.show;
      filters.forEach((other) => other.setAttribute("aria-pressed", other === filter));
      for (const check of checks) {
        check.hidden = wanted !== "" && check.dataset.show !== wanted && check.dataset.other !== wanted;
      }
      const shown = checks.filter((check) => !check.hidden).length;
      status.textContent = wanted === "" ? "" : `${shown} of ${checks.length} checks: ${wanted}`;
    });
  }

  const headers = [...table.querySelectorAll("[data-sort]")];
  for (const header of headers) {
    header.addEventListener("click", () => {
      const key = header.dataset.sort;
      const cell = header.closest("th");
      // Numbers, the worst outcome too: the largest first.
      const first = ["name", "outcome"].includes(key) ? "ascending" : "descending";
      const second = first === "ascending" ? "descending" : "ascending";
      const direction = cell.getAttribute("aria-sort") === first ? second : first;
      headers.forEach((other) => other.closest("th").setAttribute("aria-sort", "none"));
      cell.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const order = (a, b) => key === "name"
        ? a.dataset.name.localeCompare(b.dataset.name)
        : Number(a.dataset[key]) - Number(b.dataset[key]);
      checks.sort((a, b) => sign * order(a, b)).forEach((check) => table.append(check));
    });
  }

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.closest("figure").querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(code); // where the page may not write to the clipboard
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
  }
})();
