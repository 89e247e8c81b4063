"""The embedded text: the same for one Python, of many subjects, and without repetition."""

from __future__ import annotations

import hashlib
import subprocess
import sys

from exporter.tokens.embedded import embedded_beginning, embedded_text


def test_it_is_long_and_without_repetition() -> None:
    text = embedded_text()
    assert len(text) > 1_500_000
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(paragraph.strip() for paragraph in paragraphs if paragraph)


def test_another_process_makes_the_same() -> None:
    """Whatever the hash seed; and without importing the modules that it reads."""
    program = (
        "import hashlib, sys\nfrom exporter.tokens.embedded import embedded_text\n"
        "print(hashlib.sha256(embedded_text().encode()).hexdigest(), {'this', 'wave', 'imaplib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"{hashlib.sha256(embedded_text().encode()).hexdigest()} set()\n"


def test_it_begins_with_the_help_in_its_fixed_order() -> None:
    """Verification scores the beginning: the figures in docs/measurements and the demo's are of this text."""
    from pydoc_data.topics import topics

    order = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    help_text = "\n\n".join(dict.fromkeys(part for name in order for part in topics[name].strip().split("\n\n")))
    beginning = embedded_beginning()
    assert embedded_text().startswith(beginning + "\n\n")
    assert help_text.startswith(beginning)
    assert 64_000 <= len(beginning) < 70_000


def test_subjects_are_many_and_mixed() -> None:
    text = embedded_text()
    marks = {
        "help": "compound statement",
        "docstrings": "Return the sample arithmetic mean of data.",
        "code": "self.assertEqual(",
        "zen": "Namespaces are one honking great idea",
        "licence": "PYTHON SOFTWARE FOUNDATION LICENSE",
    }
    assert {name for name, mark in marks.items() if mark not in text} == set()
    # In every twentieth of what follows the beginning there is code, and there is prose.
    rest = text[len(embedded_beginning()) :]
    parts = [
        rest[start : start + len(rest) // 20] for start in range(0, len(rest) - len(rest) // 20 + 1, len(rest) // 20)
    ]
    assert all(part.count("    return ") > 5 and part.count(". ") > 50 for part in parts)
