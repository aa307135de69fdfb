"""Helpers for SVG charts, HTML pages and PNG figures; they know no chapter."""
