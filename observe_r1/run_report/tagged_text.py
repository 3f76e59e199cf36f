"""The parts of a completion, to be marked: what was observed, what was thought, what was answered."""

from __future__ import annotations

from observe_r1.tags import TAG

MOST_CHARACTERS = 3000  # of a completion on a page


def tagged_parts(text: str, most: int = MOST_CHARACTERS) -> list[tuple[str, str]]:
    """Pieces of the text in their order with the innermost open tag, `tag` for tags themselves, or an empty name.

    Joined they are the text, up to the limit; a last piece named `cut` says how much there was beyond it.
    """
    shown = text[:most]
    pieces: list[tuple[str, str]] = []
    opened: list[str] = []
    end = 0
    for match in TAG.finditer(shown):
        pieces.append((opened[-1] if opened else "", shown[end : match.start()]))
        pieces.append(("tag", match.group()))
        name = match.group().strip("</>")
        if not match.group().startswith("</"):
            opened.append(name)
        elif name in opened:
            while opened.pop() != name:
                pass
        end = match.end()
    pieces.append((opened[-1] if opened else "", shown[end:]))
    if len(text) > most:
        pieces.append(("cut", f"{len(text) - most:,} more characters"))
    return [(name, piece) for name, piece in pieces if piece]
