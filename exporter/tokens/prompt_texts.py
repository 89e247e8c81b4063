"""Texts to tokenize, conversations to render, and beginnings to continue. We wrote all of them."""

# Some of the texts are about characters that look alike.
# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Texts have names for the report. Characters that an editor might change or hide are escaped.
TEXTS: Mapping[str, str] = {
    "empty": "",
    "space": " ",
    "newline": "\n",
    "english": "The quick brown fox can't jump; it's 5 o'clock, we'll wait. THEY'RE late, I'd say, and she'S not.",
    "chinese": "今天天气很好,我们去公园散步吧。人工智能正在改变世界!2024年是闰年。",
    "chinese rare": "𠮷野家在𡈽佐,㐂ぶ䶮。",
    "japanese": "吾輩は猫である。名前はまだ無い。カタカナとひらがな、ハンカク。ベ",
    "korean": "안녕하세요, 만나서 반갑습니다. 오늘은 날씨가 좋네요.",
    "arabic": "مرحبًا بالعالم، كيف حالُك؟ ١٢٣٤٥٦ السَّلامُ عليكم",
    "hebrew": "שָׁלוֹם עולם, מה שלומך?",
    "hindi": "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय श्रीमती १२३",
    "thai": "สวัสดีชาวโลก น้ำใจงาม",
    "tamil": "வணக்கம் உலகம், நீங்கள் எப்படி இருக்கிறீர்கள்?",
    "russian": "Привет, мир! Съешь же ещё этих мягких французских булок.",
    "greek": "Καλημέρα κόσμε, τί κάνεις; ΟΔΥΣΣΕΎΣ",
    "vietnamese": "Tiếng Việt có nhiều dấu thanh: ạ ả ấ ầ ẩ ẫ ậ.",
    "emoji": "😀 👍🏽👍🏿 👩\u200d💻 👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇩🇪🇯🇵 ❤\ufe0f ☺\ufe0e 1\ufe0f⃣",
    "symbols": "∀x∈ℝ: x² ≥ 0 ⇒ √(x²)=|x|; ½ + ⅓ ≠ Ⅷ; €£¥₿ © ™ — – … «» „“ ‽",
    "python": 'def f(x: int) -> str:\n\tif x < 10:\n\t\treturn f"{x!r:>8}"\n    # mixed   indent\n\treturn "\\n"\n\n\n',
    "javascript": "const f = async (x) => ({ ...x, y: x?.y ?? [] }); // `${a}` && /\\d+/g.test(b)\n",
    "c": '#include <stdio.h>\nint main(void) {\n        printf("%d\\n", 0xFF << 3);\t/* tab */\n}\n',
    "json": '{"key": [1, 2.5e-10, null, true], "nested": {"a\\u00e9": "\\\\"}}',
    "markup": "<p class='x'>a &amp; b</p>\n<!-- -->\n| a | b |\n|---|---|\n**bold** _it_ `code`\n",
    "url": "https://user@example.org:8080/a/b%20c?q=1&r=%C3%A9#frag me@example.com C:\\Users\\x",
    "digits": "0 7 42 123 1234 12345 1234567890 3.14159 1,000,000 007 1e100 ١٢٣ १२३ 123 ²³ ₄ ⑤",
    "spaces": "a b  c   d    e        f                g  ",
    "leading spaces": "   three and then",
    "tabs": "a\tb\t\tc \t d\t",
    "newlines": "a\n\nb\n\n\nc \n d\n  \n\n e\n",
    "crlf": "one\r\ntwo\r\n\r\nthree\rfour\n\rfive",
    "unicode spaces": "a\u00a0b\u2003c\u2009d\u3000e\u202ff\u205fg\u1680h\u0085i\u2028j\u2029k\u000bl\u000cm",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg\u200eh\u202ei\u202cj",
    "composed": "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u1e69 \ud55c\uae00 \u1e0d\u0307",
    "decomposed": "cafe\u0301 nai\u0308ve A\u030angstro\u0308m  s\u0323\u0307 \u1112\u1161\u11ab d\u0307\u0323",
    "compatibility": "\ufb01ne \u2126 \u212b \u2460 \uff21\uff22 \uf900 \u0958",
    "stacked marks": "Z\u0351\u036b\u0343\u036a\u0302a\u0300\u0301\u0302\u0303\u0304l\u0335g\u0336o\u0337",
    "controls": "a\u0001b\u0007c\u001bd\u007fe\u0080f\u009fg",
    "last planes": "\U0001f9ff\U000e0041\U0010fffd\ue000\uffff\ufffd",
    "long word": "Donaudampfschifffahrtselektrizit\u00e4tenhauptbetriebswerkbauunterbeamtengesellschaft" * 3,
    "one letter": "a" * 300,
    "one mark": "!" * 120 + "=" * 80 + "-" * 70 + "." * 33,
    "mixed scripts": "abc中文defкир123ابجxyz日本語4テスト5",
    "apostrophes": "I'm you're he's we'd they'll I've 'twas ''s 'S 'RE O\u2019Neil don\u2019t x'y 'ſ 'K",
    "brackets in text": "a <|not a token|> b < | im_start | > c <|im_start> d im_end|> e <think > f [INST] g",
    "other ends": "a </s> <s> <eos> <|eot_id|> <end_of_turn> [/INST] <s>struck</s> out",
}

# A conversation is skipped if the source's template refuses it. Contents have characters that a second rendering is
# likely to change: quotes, angle brackets, ampersands and other scripts, through tojson and through plain output.
_TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's weather in a place: \u00b0C, rain & wind, <fast>.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "enum": ["K\u00f6ln", "\u5317\u4eac"]}},
                "required": ["place"],
            },
        },
    },
)
_CALL: Mapping[str, Any] = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "K\u00f6ln", "note": 'it\'s <now> & "here"'}},
}
_USER = {"role": "user", "content": "What's 2 < 3 & 4 > 1?  Say \u201cyes\u201d or \u5426.\n"}
_SYSTEM = {"role": "system", "content": "You answer in one word."}
_ASSISTANT = {"role": "assistant", "content": "yes"}

CONVERSATIONS: Mapping[str, Mapping[str, Any]] = {
    "user": {"messages": [_USER]},
    "system": {"messages": [_SYSTEM, _USER]},
    "turns": {"messages": [_SYSTEM, _USER, _ASSISTANT, {"role": "user", "content": "Sure?"}]},
    "thinking": {
        "messages": [_USER, {"role": "assistant", "content": "<think>\n2 < 3\n</think>\n\nyes"}, _USER],
    },
    "reasoning content": {
        "messages": [_USER, _ASSISTANT | {"reasoning_content": "2 < 3, so it's true."}, _USER],
    },
    "no thinking": {"messages": [_USER], "enable_thinking": False},
    "tools": {"messages": [_SYSTEM, _USER], "tools": list(_TOOLS)},
    "tool call": {
        "messages": [
            _USER,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call00001", "content": '{"t": 21, "s": "\u65e5"}'},
        ],
        "tools": list(_TOOLS),
    },
}

SHORT = "The capital of France is"
QUESTION = "Name three colours."
# The answer is complete, so a model that learned to end its turn ends it here.
ANSWER = "Red, green and blue."
