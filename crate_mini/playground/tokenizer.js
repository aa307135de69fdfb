"use strict";
// The byte-level BPE of data/tokenizer.py: from text to ids and back. Bytes are strings of
// characters below 256, one for each byte, as atob returns them.

const SPACE = "\\p{White_Space}";  // JavaScript's \s has other members
const SPLIT = new RegExp([
  "'(?:[sdmt]|ll|ve|re)", " ?\\p{L}+", " ?\\p{N}+", ` ?[^${SPACE}\\p{L}\\p{N}]+`,
  `${SPACE}+$`, `${SPACE}+(?!\\P{White_Space})`, SPACE,
].join("|"), "gu");

class Tokenizer {
  // ranks: the bytes of each token in base64, in the order of their ids; the next id ends a text.
  constructor(ranks) {
    this.tokens = ranks.map(atob);
    this.ids = new Map(this.tokens.map((bytes, id) => [bytes, id]));
    this.pieces = new Map();  // ids of pieces seen before
  }

  encode(text) {
    const ids = [];
    for (const [piece] of text.matchAll(SPLIT)) {
      if (!this.pieces.has(piece)) {
        if (this.pieces.size > 20000) this.pieces.clear();
        this.pieces.set(piece, this.encodePiece(piece));
      }
      for (const id of this.pieces.get(piece)) ids.push(id);
    }
    return ids;
  }

  encodePiece(piece) {
    const parts = [];
    for (const byte of new TextEncoder().encode(piece)) parts.push(String.fromCharCode(byte));
    const whole = this.ids.get(parts.join(""));
    if (whole !== undefined) return [whole];
    this.merge(parts);
    return parts.map(bytes => this.ids.get(bytes));
  }

  // Joins the neighbours that make the token of lowest rank, the leftmost first, while any do.
  merge(parts) {
    const rank = i => this.ids.get(parts[i] + parts[i + 1]) ?? Infinity;
    const ranks = parts.slice(1).map((_, i) => rank(i));
    for (;;) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (!(ranks[best] < Infinity)) return;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best, 1);
      if (best > 0) ranks[best - 1] = rank(best - 1);
      if (best < ranks.length) ranks[best] = rank(best);
    }
  }

  // Bytes that are not UTF-8, such as half a character, become U+FFFD.
  decode(ids) {
    const bytes = ids.map(id => this.tokens[id] ?? (id === this.tokens.length ? END : "")).join("");
    const array = Uint8Array.from(bytes, character => character.charCodeAt(0));
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(array);
  }
}

const END = "<|endoftext|>";
