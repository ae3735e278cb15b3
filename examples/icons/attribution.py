"""The page that names every icon set that the package ships, its author and its licence."""

from __future__ import annotations

from collections import Counter
from typing import Any

from catalogue import IconSet

INTRODUCTION = """\
# Where the demo's pictures and captions come from

`icons.parquet` holds {num_pairs:,} icons and emoji of {num_sets} sets with their names. They were
drawn by the authors below and are used under the licences named. Changes: every drawing was
rendered at 32 x 32 pixels on white, and reduced to 64 colours where it had more; names were
written as words, and keywords added. No author endorses this package. Logos of companies and
products are trademarks of their owners whatever the licence of the drawing; they serve here only
as test data for image-text matching.

The sets are taken from the npm package `@iconify/json`. Keywords of emoji come from Unicode CLDR
(Unicode-3.0, (c) Unicode, Inc.); those of `mdi`, `tabler`, `lucide` and `fa7-solid` from the
packages `@mdi/svg` (Apache-2.0), `@tabler/icons` (MIT), `lucide-static` (ISC) and
`@fortawesome/fontawesome-free` (CC-BY-4.0). `reference.safetensors` was trained on drawings of
the emoji sets `emojione`, `noto`, `noto-v1` and `twemoji`.

| set | name | author | licence | pairs |
|---|---|---|---|---|
"""
LICENCES = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "BSD-3-Clause": "https://opensource.org/license/bsd-3-clause",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "ISC": "https://opensource.org/license/isc-license-txt",
    "MIT": "https://opensource.org/license/mit",
    "Unlicense": "https://unlicense.org",
}
MIT_TEXT = """
## The MIT licence

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

## The ISC licence

Permission to use, copy, modify, and/or distribute this software for any purpose with or without
fee is hereby granted, provided that the above copyright notice and this permission notice appear
in all copies.

THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS
SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE
AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT, INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES
WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN ACTION OF CONTRACT,
NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR PERFORMANCE
OF THIS SOFTWARE.
"""


def attribution_page(rows: list[dict[str, Any]], icon_sets: dict[str, IconSet]) -> str:
    """Returns the page as Markdown: one line per set, then the licences."""
    counts = Counter(row["set"] for row in rows)
    page = INTRODUCTION.format(num_pairs=len(rows), num_sets=len(counts))
    for prefix, count in sorted(counts.items()):
        icon_set = icon_sets[prefix]
        author = icon_set.author.replace("|", "/")
        author_link = f"[{author}]({icon_set.url})" if icon_set.url else author
        page += f"| {prefix} | {icon_set.name} | {author_link} | {icon_set.licence} | {count} |\n"
    page += "\n## The licences\n\n"
    used = sorted({row["licence"] for row in rows})
    page += "".join(f"- {licence}: {LICENCES[licence]}\n" for licence in used)
    return page + MIT_TEXT
