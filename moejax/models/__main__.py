"""`python -m moejax.models`: the published sizes, counted and not allocated."""

from moejax import models


def main() -> None:
    head = ("preset", "family", "parameters", "active", "without embedding", "active", "bf16 GB", "fp8 GB")
    rows = [
        (p.name, p.family, f"{p.total:,}", f"{p.active:,}", f"{p.total - p.embedding:,}",
         f"{p.active_without_embedding:,}", f"{2 * p.total / 1e9:,.1f}", f"{p.total / 1e9:,.1f}")
        for p in models.presets()
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
