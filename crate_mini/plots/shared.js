"use strict";
// What scripts of pages share; every page begins with it.

const missing = value => value === null || value === undefined;

// An element; attributes "onclick" etc. are listeners, "--a" etc. are properties of its style.
function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) {
      element.addEventListener(key.slice(2), value);
    } else if (key.startsWith("--")) {
      element.style.setProperty(key, value);
    } else if (!missing(value) && value !== false) {
      element.setAttribute(key, value);
    }
  }
  element.append(...children.filter(child => !missing(child)));
  return element;
}

// mulberry32: a function that returns numbers in [0, 1), the same for a seed on every machine.
function generator(seed) {
  let a = seed >>> 0;
  return () => {
    a = a + 0x6D2B79F5 | 0;
    let t = Math.imul(a ^ a >>> 15, 1 | a);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 4294967296;
  };
}
