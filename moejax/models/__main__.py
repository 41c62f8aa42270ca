"""`python -m moejax.models`: the published sizes and the caches of latent attention, counted and not allocated."""

from collections.abc import Sequence

from moejax import models

DENSE_67B = 95 * 2 * 8 * 128 * 2  # DeepSeek 67B: layers, keys and values, heads of them, their width, bytes in 16 bits


def main() -> None:
    head = ("preset", "family", "parameters", "active", "without embedding", "active", "bf16 GB", "fp8 GB")
    rows = [
        (p.name, p.family, f"{p.total:,}", f"{p.active:,}", f"{p.total - p.embedding:,}",
         f"{p.active_without_embedding:,}", f"{2 * p.total / 1e9:,.1f}", f"{p.total / 1e9:,.1f}")
        for p in models.presets()
    ]  # fmt: skip
    show(head, rows, left=2)
    print("\nBytes of the cache for each token in bf16: latent attention, and full keys and values of the same heads.")
    caches = models.latent_caches()
    show(
        ("preset", "latent", "full", "less"),
        [(c.name, f"{c.latent:,}", f"{c.full:,}", f"{100 * c.saved:.2f}%") for c in caches],
        left=1,
    )
    (v2,) = (c.latent for c in caches if c.name == "deepseek-v2")
    less = 100 * (1 - v2 * 6 / 16 / DENSE_67B)
    print(
        f"The {less:.1f}% less that DeepSeek-V2's paper tells are its numbers in 6 bits ({v2 * 6 // 16:,} bytes) "
        f"beside a dense 67B model with grouped queries in 16 ({DENSE_67B:,})."
    )


def show(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int) -> None:
    """A table, its first `left` columns ranged left and the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        pairs = enumerate(zip(row, widths, strict=True))
        print("  ".join(text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in pairs).rstrip())


if __name__ == "__main__":
    main()
