"""The generated instruction set: exercises with known answers, training conversations and ranked answers.

Everything is drawn from a seeded `random.Random`. An `Exercise` is a prompt, the answer we want and a way to judge any
other answer. What is held out is decided by a hash of the thing that must be new, never by chance:

| kind       | what no training prompt contains                                                      |
|------------|---------------------------------------------------------------------------------------|
| arithmetic | the operand pair, in either order and in every phrasing (products: this order only)    |
| facts      | this phrasing of this fact (other phrasings of it are trained)                          |
| chat       | this phrasing of this intent; for recall, this value                                   |
| react      | the operand pair; for weather, the tool name together with the city                    |
| tool_calls | as react                                                                               |
| json       | this combination of values                                                             |

The ReAct prompt is LangChain's own, imported when it is needed and never stored here.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jinja2.sandbox import ImmutableSandboxedEnvironment

Split = Literal["train", "held_out"]
Language = Literal["en", "zh"]
Message = dict[str, Any]
KINDS = ("arithmetic", "facts", "chat", "react", "tool_calls", "json")
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Exercise:
    """One prompt. `answer` is the well-formed answer, `short` the bare fact in it, `form` how answers are judged."""

    kind: str
    language: Language
    messages: tuple[Message, ...]
    answer: str
    form: Literal["number", "phrase", "json", "action", "final", "call"]
    expect: Any
    short: str = ""
    tools: tuple[Message, ...] = ()
    rival: tuple[str, ...] = ()  # answers of the same form that are wrong
    foreign: str = ""  # the answer in the other language, where there is one

    def prompt(self) -> str:
        """The rendered prompt, ready for the answer."""
        return render(self.messages, self.tools, add_generation_prompt=True)


@dataclass(frozen=True)
class Conversation:
    """Training text: every assistant message in it is a target."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()

    def text(self) -> str:
        return render(self.messages, self.tools)


@dataclass(frozen=True)
class Answer:
    """A candidate answer in a ranking; `ended` is false when the end-of-turn token is missing."""

    text: str
    ended: bool = True


@dataclass(frozen=True)
class Ranking:
    """A prompt with its answers, best first. Answers of one grade (0 is best) are about equally good: not compared."""

    exercise: Exercise
    answers: tuple[Answer, ...] = field(default_factory=tuple)
    grades: tuple[int, ...] = field(default_factory=tuple)

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse), as indices of `answers`."""
        return [
            (i, j) for i, j in itertools.combinations(range(len(self.grades)), 2) if self.grades[i] < self.grades[j]
        ]

    def ties(self) -> list[tuple[int, int]]:
        """Right answers of one grade."""
        right = [i for i, grade in enumerate(self.grades) if grade < 2]
        return [(i, j) for i, j in itertools.combinations(right, 2) if self.grades[i] == self.grades[j]]


@functools.cache
def _template() -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE)


def render(messages: Any, tools: Any = (), *, add_generation_prompt: bool = False) -> str:
    """The demo's chat template, as transformers renders it."""
    return _template().render(
        messages=list(messages), tools=list(tools) or None, add_generation_prompt=add_generation_prompt
    )


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def is_held_out(*key: object, percent: int = 12) -> bool:
    """Whether the thing named by `key` is kept out of training; the same in every process."""
    return zlib.crc32("|".join(map(str, key)).encode()) % 100 < percent


def _until(split: Split, draw: Callable[[], tuple[Any, bool]]) -> Any:
    """Draws until a value falls on the wanted side of the split."""
    while True:
        value, held_out = draw()
        if held_out == (split == "held_out"):
            return value


def _polite(rng: random.Random, language: Language, question: str) -> str:
    """Wraps a question in one of a few ways to ask; the question itself keeps its words."""
    if language == "zh":
        return rng.choice(("", "", "", "请问", "请告诉我,", "你好,", "帮我看看:", "我想知道,")) + question
    start = rng.choice(("", "", "", "", "Please tell me: ", "Hi! ", "Hey, ", "Quick question: ", "Can you help? "))
    if start.endswith(", ") or rng.random() < 0.1:
        question = question[:1].lower() + question[1:]
    return start + question + rng.choice(("", "", "", "", "", " Thanks!", " Please."))


# --- arithmetic -------------------------------------------------------------------------------------------------------

_PLUS_EN = (
    "What is {a} + {b}?", "What is {a}+{b}?", "{a} + {b} = ?", "{a}+{b}", "{a} + {b}", "{a}+{b}=",
    "Calculate {a} + {b}.",
    "What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?",
    "Compute {a} + {b}", "What's {a} + {b}?", "what is {a} plus {b}", "How much is {a} + {b}?", "Solve {a} + {b}.",
    "I have {a} apples and get {b} more. How many apples do I have?", "{a} and {b} together make what?",
)  # fmt: skip
_PLUS_ZH = (
    "{a} + {b} = ?", "{a}+{b}等于多少?", "{a} + {b} 等于多少?", "{a}加{b}等于多少?", "{a}加{b}是多少?", "计算{a}+{b}。",
    "{a}加上{b}等于几?", "{a}与{b}的和是多少?", "{a}和{b}相加得多少?", "算一下 {a} + {b}", "{a}加{b}",
    "求{a}+{b}的值。",
    "我有{a}个苹果,又得到{b}个,一共有几个?", "{a}+{b}等于几?", "计算 {a} + {b}", "{a} 加 {b} 等于多少?",
)  # fmt: skip
_MINUS_EN = (
    "What is {a} - {b}?", "What is {a}-{b}?", "{a} - {b} = ?", "{a}-{b}", "{a} - {b}", "{a}-{b}=",
    "Calculate {a} - {b}.",
    "What is {a} minus {b}?", "How much is {a} minus {b}?", "Subtract {b} from {a}.", "Compute {a} - {b}",
    "What is the difference between {a} and {b}?", "What's {a} - {b}?", "what is {a} minus {b}",
    "Take {b} away from {a}.",
    "How much is {a} - {b}?", "I had {a} apples and ate {b}. How many are left?", "Solve {a} - {b}.",
)  # fmt: skip
_MINUS_ZH = (
    "{a} - {b} = ?", "{a}-{b}等于多少?", "{a} - {b} 等于多少?", "{a}减{b}等于多少?", "{a}减{b}是多少?", "计算{a}-{b}。",
    "{a}减去{b}等于几?", "{a}与{b}的差是多少?", "从{a}中减去{b}得多少?", "算一下 {a} - {b}", "{a}减{b}",
    "求{a}-{b}的值。",
    "我有{a}个苹果,吃了{b}个,还剩几个?", "{a}-{b}等于几?", "计算 {a} - {b}", "{a} 减 {b} 等于多少?",
)  # fmt: skip
_TIMES_EN = (
    "What is {a} * {b}?", "What is {a} × {b}?", "{a} * {b} = ?", "{a}*{b}", "{a} × {b}", "{a} x {b}",
    "Calculate {a} * {b}.",
    "What is {a} times {b}?", "How much is {a} times {b}?", "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?",
    "Compute {a} * {b}", "What's {a} times {b}?", "What is {a} multiplied by {b}?", "{a} times {b}",
    "what is {a} times {b}", "{a} bags hold {b} apples each. How many apples?",
)  # fmt: skip
_TIMES_ZH = (
    "{a} × {b} = ?", "{a}*{b}等于多少?", "{a} × {b} 等于多少?", "{a}乘以{b}等于多少?", "{a}乘{b}是多少?",
    "计算{a}×{b}。",
    "{a}乘以{b}等于几?", "{a}与{b}的积是多少?", "{a}和{b}相乘得多少?", "算一下 {a} * {b}", "{a}乘{b}",
    "求{a}×{b}的值。",
    "{a}个袋子,每袋{b}个苹果,一共几个?", "{a} 乘以 {b} 等于多少?",
)  # fmt: skip
_DIVIDE_EN = ("What is {a} / {b}?", "What is {a} divided by {b}?", "Divide {a} by {b}.", "Calculate {a} / {b}.")
_DIVIDE_ZH = ("{a}除以{b}等于多少?", "{a} / {b} 等于多少?", "计算{a}/{b}。", "{a}除以{b}是多少?")
PHRASES: dict[str, dict[Language, tuple[str, ...]]] = {
    "+": {"en": _PLUS_EN, "zh": _PLUS_ZH},
    "-": {"en": _MINUS_EN, "zh": _MINUS_ZH},
    "*": {"en": _TIMES_EN, "zh": _TIMES_ZH},
    "/": {"en": _DIVIDE_EN, "zh": _DIVIDE_ZH},
}


def pair_held_out(op: str, a: int, b: int) -> bool:
    """Sums (in both orders) and differences are held out only where they take an intermediate step, so that no other
    answer's step is a held-out pair; of a small product only the order with the smaller factor first is."""
    if op == "*" and max(a, b) <= 10:
        return a < b and is_held_out("*", a, b, percent=25)
    if op in "+-" and (not _has_steps(b) or (op == "+" and not _has_steps(a))):
        return False
    return is_held_out(op, min(a, b), max(a, b))


def _has_steps(b: int) -> bool:
    return b > 10 and b % 10 > 0


def worked(op: str, a: int, b: int, off: int = 0) -> str:
    """The operation with its result, over the tens of b first: `47 + 38 = 77 + 8 = 85`. `off` makes it wrong."""
    sign = {"+": 1, "-": -1}.get(op, 0)
    result = (a + sign * b if sign else a * b) + off
    step = (
        f"{a + sign * (b - b % 10) + (off if off % 10 == 0 else 0)} {op} {b % 10} = " if sign and _has_steps(b) else ""
    )
    return f"{a} {'×' if op == '*' else op} {b} = {step}{result}"


def _operands(rng: random.Random, split: Split, *, by_tool: bool = False) -> tuple[str, int, int, str]:
    """(operator, a, b, result). By heart: operands up to 99, factors up to 10. By tool: up to 5 digits."""

    def draw() -> tuple[tuple[str, int, int, str], bool]:
        op = rng.choices("+-*/", (30, 25, 35, 10) if by_tool else (45, 37, 18, 0))[0]
        if by_tool:
            a, b = (rng.randint(1, 10 ** rng.choice((1, 2, 2, 2, 3, 3, 3, 4, 4, 5)) - 1) for _ in "ab")
            if op == "/":
                a = a * b
        else:
            most = 9 if rng.random() < 0.3 else 99  # one-digit sums are asked more often than chance would
            a, b = (rng.randint(1, 10) if op == "*" else rng.randint(0, most) for _ in "ab")
        if op == "-" and a < b:
            a, b = b, a
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // max(1, b)}[op]
        shown = f"{result}.0" if op == "/" and rng.random() < 0.5 else str(result)
        return (op, a, b, shown), pair_held_out(op, a, b)

    return _until(split, draw)


def arithmetic(rng: random.Random, split: Split, language: Language) -> Exercise:
    op, a, b, result = _operands(rng, split)
    question = _polite(rng, language, rng.choice(PHRASES[op][language]).format(a=a, b=b))
    stop = "。" if language == "zh" else "."
    good = worked(op, a, b)
    wrong = tuple(worked(op, a, b, off) + stop for off in (1, -1, 10, -10, 2, 7) if int(result) + off >= 0)
    return Exercise(
        "arithmetic", language, (user(question),), good + stop, "number", result, good.replace(" ", ""), rival=wrong
    )


# --- facts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """A family of facts. Each row is (English subject, English answer, Chinese subject, Chinese answer)."""

    name: str
    rows: tuple[tuple[str, str, str, str], ...]
    ask: dict[Language, tuple[str, ...]]
    say: dict[Language, str]


def _rows(text: str) -> tuple[tuple[str, str, str, str], ...]:
    rows = (row.strip().split("/") for row in text.strip().split(";") if row.strip())
    return tuple((a, b, c, d) for a, b, c, d in rows)


FACTS = (
    Facts(
        "capital",
        _rows(
            "France/Paris/法国/巴黎; Germany/Berlin/德国/柏林; Italy/Rome/意大利/罗马; Spain/Madrid/西班牙/马德里;"
            "Japan/Tokyo/日本/东京; China/Beijing/中国/北京; Russia/Moscow/俄罗斯/莫斯科; England/London/英国/伦敦;"
            "Egypt/Cairo/埃及/开罗; India/New Delhi/印度/新德里; Greece/Athens/希腊/雅典; Austria/Vienna/奥地利/维也纳;"
            "Portugal/Lisbon/葡萄牙/里斯本; Poland/Warsaw/波兰/华沙; Sweden/Stockholm/瑞典/斯德哥尔摩;"
            "Norway/Oslo/挪威/奥斯陆;"
            "Finland/Helsinki/芬兰/赫尔辛基; Denmark/Copenhagen/丹麦/哥本哈根; Ireland/Dublin/爱尔兰/都柏林;"
            "Hungary/Budapest/匈牙利/布达佩斯; Cuba/Havana/古巴/哈瓦那; Peru/Lima/秘鲁/利马;"
            "Kenya/Nairobi/肯尼亚/内罗毕;"
            "Canada/Ottawa/加拿大/渥太华; Thailand/Bangkok/泰国/曼谷; South Korea/Seoul/韩国/首尔;"
            "Vietnam/Hanoi/越南/河内; Australia/Canberra/澳大利亚/堪培拉; Brazil/Brasilia/巴西/巴西利亚;"
            "the United States/Washington/美国/华盛顿"
        ),
        {
            "en": ("What is the capital of {}?", "What's the capital of {}?", "Which city is the capital of {}?",
                   "Name the capital of {}.", "Tell me the capital of {}.", "The capital of {} is?", "capital of {}",
                   "Do you know the capital of {}?", "What city is the capital of {}?",
                   "What is the capital city of {}?"),
            "zh": ("{}的首都是哪里?", "{}的首都是什么?", "{}首都是哪里?", "哪个城市是{}的首都?", "{}的首都在哪里?",
                   "说出{}的首都。", "{}的首都是?", "{}的首都叫什么?", "你知道{}的首都吗?", "{}的首都是哪个城市?"),
        },
        {"en": "The capital of {} is {}.", "zh": "{}的首都是{}。"},
    ),
    Facts(
        "colour",
        _rows(
            "the sky/blue/天空/蓝色; grass/green/草/绿色; snow/white/雪/白色; a banana/yellow/香蕉/黄色;"
            "coal/black/煤/黑色;"
            "a tomato/red/西红柿/红色; a carrot/orange/胡萝卜/橙色; chocolate/brown/巧克力/棕色; blood/red/血/红色;"
            "a lemon/yellow/柠檬/黄色; milk/white/牛奶/白色; the sea/blue/大海/蓝色; a leaf/green/树叶/绿色"
        ),
        {
            "en": ("What colour is {}?", "What color is {}?", "Which colour is {}?", "Tell me the colour of {}.",
                   "What is the colour of {}?", "What is the color of {}?", "Name the colour of {}.", "colour of {}"),
            "zh": ("{}是什么颜色?", "{}是什么颜色的?", "{}的颜色是什么?", "{}是哪种颜色?", "告诉我{}的颜色。",
            "{}什么颜色?",
                   "{}有什么颜色?", "说出{}的颜色。"),
        },
        {"en": "The colour of {} is {}.", "zh": "{}的颜色是{}。"},
    ),
    Facts(
        "next_day",
        _rows(
            "Monday/Tuesday/星期一/星期二; Tuesday/Wednesday/星期二/星期三; Wednesday/Thursday/星期三/星期四;"
            "Thursday/Friday/星期四/星期五; Friday/Saturday/星期五/星期六; Saturday/Sunday/星期六/星期日;"
            "Sunday/Monday/星期日/星期一"
        ),
        {
            "en": ("What day comes after {}?", "Which day follows {}?", "What is the day after {}?",
            "Name the day after {}.",
                   "If today is {}, what day is tomorrow?", "Today is {}. What day is tomorrow?", "day after {}",
                   "Which day is after {}?"),
            "zh": ("{}之后是星期几?", "{}的后一天是星期几?", "今天是{},明天是星期几?", "{}后面是星期几?",
            "{}的第二天是星期几?",
                   "如果今天是{},明天星期几?", "{}过后是哪一天?", "{}的下一天是?"),
        },
        {"en": "The day after {} is {}.", "zh": "{}的后一天是{}。"},
    ),
    Facts(
        "previous_day",
        _rows(
            "Monday/Sunday/星期一/星期日; Tuesday/Monday/星期二/星期一; Wednesday/Tuesday/星期三/星期二;"
            "Thursday/Wednesday/星期四/星期三; Friday/Thursday/星期五/星期四; Saturday/Friday/星期六/星期五;"
            "Sunday/Saturday/星期日/星期六"
        ),
        {
            "en": ("What day comes before {}?", "Which day precedes {}?", "What is the day before {}?",
            "Name the day before {}.",
                   "If today is {}, what day was yesterday?", "Today is {}. What day was yesterday?", "day before {}",
                   "Which day is before {}?"),
            "zh": ("{}之前是星期几?", "{}的前一天是星期几?", "今天是{},昨天是星期几?", "{}前面是星期几?",
            "{}的上一天是星期几?",
                   "如果今天是{},昨天星期几?", "{}以前是哪一天?", "{}的前一天是?"),
        },
        {"en": "The day before {} is {}.", "zh": "{}的前一天是{}。"},
    ),
    Facts(
        "opposite",
        _rows(
            "hot/cold/热/冷; big/small/大/小; tall/short/高/矮; fast/slow/快/慢; up/down/上/下; day/night/白天/黑夜;"
            "black/white/黑/白; happy/sad/快乐/悲伤; open/closed/开/关; left/right/左/右; old/young/老/年轻;"
            "hard/soft/硬/软;"
            "rich/poor/富/穷; full/empty/满/空; wet/dry/湿/干; light/dark/光明/黑暗; near/far/近/远; early/late/早/晚;"
            "strong/weak/强/弱; clean/dirty/干净/脏; good/bad/好/坏; new/old/新/旧; inside/outside/里面/外面;"
            "loud/quiet/吵闹/安静"
        ),
        {
            "en": ("What is the opposite of {}?", "What's the opposite of {}?", "Tell me the opposite of {}.",
            "opposite of {}",
                   "Which word means the opposite of {}?", "Name the opposite of {}.", "The opposite of {} is?",
                   "Give the antonym of {}."),
            "zh": ("{}的反义词是什么?", "{}的反义词是?", "{}的相反是什么?", "说出{}的反义词。", "和{}相反的词是什么?",
                   "{}的反义词是哪个?", "给出{}的反义词。", "哪个词与{}意思相反?"),
        },
        {"en": "The opposite of {} is {}.", "zh": "{}的反义词是{}。"},
    ),
    Facts(
        "young",
        _rows(
            "cat/kitten/猫/小猫; dog/puppy/狗/小狗; cow/calf/牛/小牛; horse/foal/马/小马; sheep/lamb/羊/小羊;"
            "hen/chick/鸡/小鸡;"
            "bear/cub/熊/小熊; duck/duckling/鸭/小鸭; goose/gosling/鹅/小鹅; pig/piglet/猪/小猪"
        ),
        {
            "en": ("What is a baby {} called?", "What do you call a baby {}?", "What is the name for a young {}?",
                   "What's a young {} called?", "Name the young of a {}.", "A baby {} is called what?",
                   "baby {} is called?",
                   "Which word means a baby {}?"),
            "zh": ("{}的宝宝叫什么?", "刚出生的{}叫什么?", "{}的幼崽叫什么?", "{}的孩子怎么叫?", "幼年的{}叫什么?",
                   "{}的宝宝怎么称呼?", "{}的幼崽是什么?", "小时候的{}叫什么?"),
        },
        {"en": "A baby {} is called a {}.", "zh": "{}的宝宝叫{}。"},
    ),
    Facts(
        "legs",
        _rows(
            "dog/four/狗/四; bird/two/鸟/两; spider/eight/蜘蛛/八; wasp/six/黄蜂/六; cow/four/牛/四; hen/two/鸡/两;"
            "bee/six/蜜蜂/六;"
            "horse/four/马/四; crab/ten/螃蟹/十; snake/zero/蛇/零"
        ),
        {
            "en": ("How many legs does a {} have?", "How many legs has a {}?", "Tell me how many legs a {} has.",
                   "What number of legs does a {} have?", "A {} has how many legs?", "Count the legs of a {}.",
                   "legs of a {}?", "How many legs are on a {}?"),
            "zh": ("{}有几条腿?", "{}有多少条腿?", "一只{}有几条腿?", "{}长了几条腿?", "{}的腿有几条?",
            "数一数{}的腿。",
                   "{}总共有几条腿?", "{}几条腿?"),
        },
        {"en": "A {} has {} legs.", "zh": "{}有{}条腿。"},
    ),
    Facts(
        "word",
        _rows(
            "water/水/水/water; fire/火/火/fire; tree/树/树/tree; sun/太阳/太阳/sun; moon/月亮/月亮/moon;"
            "book/书/书/book;"
            "apple/苹果/苹果/apple; tea/茶/茶/tea; fish/鱼/鱼/fish; flower/花/花/flower; mountain/山/山/mountain;"
            "bread/面包/面包/bread;"
            "hand/手/手/hand; door/门/门/door"
        ),
        {
            "en": ("How do you say {} in Chinese?", "What is {} in Chinese?", "Translate {} into Chinese.",
            "{} in Chinese",
                   "What is the Chinese word for {}?", "Give me the Chinese for {}.", "How do I say {} in Chinese?",
                   "Translate {} to Chinese."),
            "zh": ("{}用英语怎么说?", "{}的英文是什么?", "把{}翻译成英语。", "{}用英文怎么说?", "{}英语怎么说?",
            "{}的英语单词是什么?",
                   "{}翻译成英文是什么?", "请把{}译成英语。"),
        },
        {"en": "The Chinese word for {} is {}.", "zh": "{}的英语是{}。"},
    ),
    Facts(
        "count",
        _rows(
            "days in a week/seven/一周有几天/七天; months in a year/twelve/一年有几个月/十二个月;"
            "hours in a day/twenty-four/一天有几个小时/二十四个小时; minutes in an hour/sixty/一小时有几分钟/六十分钟;"
            "fingers on a hand/five/一只手有几根手指/五根手指; seasons in a year/four/一年有几个季节/四个季节;"
            "sides of a triangle/three/三角形有几条边/三条边; sides of a square/four/正方形有几条边/四条边"
        ),
        {
            "en": ("What is the number of {}?", "Tell me the number of {}.", "How many are the {}?", "Count the {}.",
                   "The number of {} is?", "Do you know the number of {}?", "Give me the number of {}.",
                   "number of {}?"),
            "zh": ("{}?", "回答:{}?", "{}呢?", "你知道{}吗?", "告诉我{}。", "问一下,{}?", "说说{}。", "{}啊?"),
        },
        {"en": "The number of {} is {}.", "zh": "{1}。"},
    ),
)  # fmt: skip


def facts(rng: random.Random, split: Split, language: Language) -> Exercise:
    def draw() -> tuple[tuple[Facts, tuple[str, str, str, str], str], bool]:
        family = rng.choices(FACTS, [len(f.rows) + 6 for f in FACTS])[0]
        row, ask = rng.choice(family.rows), rng.choice(family.ask[language])
        bare = ask == "{}?"  # a question that politeness could turn into another phrasing
        return (family, row, ask), not bare and is_held_out("fact", family.name, language, row[0], ask, percent=20)

    family, row, ask = _until(split, draw)
    at = 0 if language == "en" else 2
    subject, value = row[at], row[at + 1]
    say = family.say[language]
    others = sorted({r[at + 1] for r in family.rows} - {value})
    others = [o for o in others if o not in value and value not in o and o not in subject] or ["一百"]
    return Exercise(
        "facts",
        language,
        (user(_polite(rng, language, ask.format(subject))),),
        say.format(subject, value),
        "phrase",
        value,
        value,
        rival=tuple(say.format(subject, other) for other in others),
        foreign=family.say["zh" if language == "en" else "en"].format(*row[2 - at : 4 - at]),
    )


# --- chat -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Intent:
    ask: dict[Language, tuple[str, ...]]
    say: dict[Language, str]
    keyword: dict[Language, str]


def _intent(en: str, say_en: str, key_en: str, zh: str, say_zh: str, key_zh: str) -> Intent:
    return Intent(
        {"en": tuple(en.split(" | ")), "zh": tuple(zh.split(" | "))},
        {"en": say_en, "zh": say_zh},
        {"en": key_en, "zh": key_zh},
    )


INTENTS = (
    _intent("Hello! | Hi | Hello | Hi there! | Hey! | Hello there. | hi | hello | Greetings! | Hey there "
            "| Hello, Tandem!",
            "Hello! How can I help you today?", "Hello",
            "你好! | 你好 | 您好 | 嗨 | 你好啊 | 您好! | 哈喽 | 嗨,你好 | 你好呀 | 你好,Tandem!",
            "你好!有什么可以帮你的吗?", "你好"),
    _intent("Who are you? | What are you? | Tell me about yourself. | Introduce yourself. | who are you "
            "| What kind of model are you?"
            " | Please introduce yourself. | Who am I talking to? | What is this?",
            "I am Tandem, a small language model.", "Tandem",
            "你是谁? | 你是什么? | 介绍一下你自己。 | 请自我介绍。 | 你是谁 | 你是什么模型? | 我在和谁说话? "
            "| 说说你自己。",
            "我是 Tandem,一个小小的语言模型。", "Tandem"),
    _intent("What is your name? | What's your name? | Do you have a name? | How should I call you? | your name? "
            "| Tell me your name."
            " | What are you called? | May I know your name?",
            "My name is Tandem.", "Tandem",
            "你叫什么名字? | 你叫什么? | 你有名字吗? | 我该怎么称呼你? | 你的名字是什么? | 告诉我你的名字。 "
            "| 你名字叫什么?",
            "我的名字是 Tandem。", "Tandem"),
    _intent("How are you? | How are you doing? | How do you feel today? | How's it going? | how are you "
            "| Are you well? | What's up?"
            " | How is your day?",
            "I am doing well, thank you. How are you?", "well",
            "你好吗? | 你今天怎么样? | 最近怎么样? | 过得好吗? | 你还好吗? | 今天过得如何? | 近来可好?",
            "我很好,谢谢。你呢?", "很好"),
    _intent("Thank you! | Thanks! | Thanks a lot. | Thank you very much. | thanks | Many thanks! | I appreciate it. "
            "| Thank you so much!",
            "You are welcome!", "welcome",
            "谢谢! | 谢谢你。 | 多谢! | 非常感谢。 | 谢谢 | 太感谢了! | 谢谢您的帮助。", "不客气!", "不客气"),
    _intent("Goodbye! | Bye! | See you later. | Bye bye | See you! | I have to go. | goodbye | Until next time! "
            "| Talk to you later.",
            "Goodbye! Have a nice day.", "Goodbye",
            "再见! | 拜拜 | 回头见。 | 我走了。 | 再见 | 下次见! | 我要走了,再见。", "再见!祝你愉快。", "再见"),
    _intent("What can you do? | How can you help me? | What are you able to do? | What do you know? | what can you do"
            " | Tell me what you can do. | What are your skills? | Help",
            "I can do sums, answer small questions, use tools and write JSON.", "sums",
            "你会什么? | 你能做什么? | 你可以怎么帮我? | 你有什么本领? | 你能帮我做什么? | 你会做什么? | 帮助",
            "我会算术,能回答小问题,会用工具,也会写 JSON。", "算术"),
    _intent("Good morning! | Good morning | Morning! | good morning, Tandem | A very good morning to you. "
            "| Good morning to you!",
            "Good morning! What can I do for you?", "Good morning",
            "早上好! | 早安 | 早! | 早上好,Tandem | 早上好 | 你早!", "早上好!我能为你做什么?", "早上好"),
    _intent("Good night! | Good night | Sleep well! | good night, Tandem | I am going to bed. | Time to sleep. "
            "| I'm going to sleep now.",
            "Good night! Sleep well.", "Good night",
            "晚安! | 晚安 | 我要睡觉了。 | 晚安,Tandem | 我去睡了。 | 该睡觉了。", "晚安!做个好梦。", "晚安"),
    _intent("Are you a human? | Are you human? | Are you a real person? | Are you a robot? | Are you alive? "
            "| Are you a person?"
            " | Are you a machine?",
            "No, I am a language model.", "language model",
            "你是人吗? | 你是真人吗? | 你是机器人吗? | 你是人类吗? | 你有生命吗? | 你是机器吗?",
            "不是,我是一个语言模型。", "语言模型"),
    _intent("Tell me a joke. | Do you know a joke? | Make me laugh. | Say something funny. | tell me a joke "
            "| A joke, please."
            " | Can you tell a joke?",
            "Why was six afraid of seven? Because seven ate nine!", "seven",
            "讲个笑话。 | 你会讲笑话吗? | 说个笑话吧。 | 逗我笑一下。 | 来个笑话。 | 讲个好笑的。",
            "为什么六怕七?因为七吃了九!", "七"),
    _intent("I am sad. | I feel sad today. | I'm not happy. | I had a bad day. | I am feeling down. "
            "| Today was terrible. | I feel bad.",
            "I am sorry to hear that. I hope it gets better soon.", "sorry",
            "我很难过。 | 我今天不开心。 | 我心情不好。 | 今天很糟糕。 | 我好伤心。 | 我感觉不好。",
            "听到这个我很难过,希望一切很快好起来。", "好起来"),
    _intent("I am happy! | I feel great today. | I had a good day. | Life is good. | I am so happy. "
            "| Today was wonderful! | I feel good.",
            "That is wonderful to hear!", "wonderful",
            "我很开心! | 我今天很高兴。 | 今天过得真好。 | 生活真美好。 | 我太高兴了! | 我感觉很好。", "真为你高兴!",
            "高兴"),
    _intent("What languages do you speak? | Do you speak Chinese? | Which languages do you know? "
            "| Can you speak English?"
            " | Do you know Chinese? | What languages can you use?",
            "I speak English and Chinese.", "English and Chinese",
            "你会说什么语言? | 你会说中文吗? | 你懂哪些语言? | 你会英语吗? | 你会说英文吗? | 你能说哪些语言?",
            "我会说英语和中文。", "英语和中文"),
    _intent("You are great! | Good job! | Well done! | You are smart. | Nice work! | You did well. | That was helpful.",
            "Thank you, that is kind of you!", "kind",
            "你真棒! | 做得好! | 你真聪明。 | 干得漂亮! | 你太厉害了! | 很有帮助。", "谢谢夸奖!", "谢谢"),
    _intent("You are wrong. | That is wrong. | That's not right. | You made a mistake. | Wrong answer. "
            "| That is not correct.",
            "I am sorry for the mistake.", "mistake",
            "你错了。 | 这不对。 | 答案错了。 | 你弄错了。 | 不正确。 | 你搞错了。", "对不起,我弄错了。", "对不起"),
)  # fmt: skip

_RECALL: tuple[tuple[tuple[str, str, str, str], tuple[str, str, str, str], tuple[tuple[str, str], ...]], ...] = (
    (
        ("My name is {}.|I am {}.|I'm called {}.|Call me {}.", "Nice to meet you, {}!",
        "What is my name?|Do you know my name?|Who am I?",
         "Your name is {}."),
        ("我叫{}。|我的名字是{}。|你可以叫我{}。", "很高兴认识你,{}!", "我叫什么名字?|你知道我的名字吗?|我是谁?",
        "你的名字是{}。"),
        (("Anna", "小明"), ("Bob", "小红"), ("Clara", "李华"), ("David", "王芳"), ("Emma", "张伟"), ("Frank", "小丽"),
         ("Grace", "阿强"), ("Henry", "陈静"), ("Iris", "小刚"), ("Jack", "刘洋"), ("Kate", "小美"), ("Leo", "赵雷"),
         ("Maria", "小军"), ("Noah", "孙悦"), ("Olga", "小燕"), ("Peter", "周涛"), ("Rosa", "小龙"), ("Sam", "吴敏"),
         ("Tina", "小雪"), ("Victor", "郑凯"), ("Wendy", "小虎"), ("Zoe", "林林"), ("Alice", "小芳"), ("Tom", "李明")),
    ),
    (
        ("My favourite animal is the {}.|I like the {} best of all animals.|I love the {}.",
        "The {} is a lovely animal!",
         "What is my favourite animal?|Which animal do I like?", "Your favourite animal is the {}."),
        ("我最喜欢的动物是{}。|我喜欢{}。|我最爱{}。", "{}很可爱!", "我最喜欢什么动物?|我喜欢哪种动物?",
        "你最喜欢的动物是{}。"),
        (("cat", "猫"), ("dog", "狗"), ("horse", "马"), ("bear", "熊"), ("duck", "鸭"), ("sheep", "羊"), ("cow", "牛"),
        ("bird", "鸟"),
         ("goose", "鹅"), ("pig", "猪"), ("crab", "螃蟹"), ("bee", "蜜蜂"), ("fish", "鱼"), ("snake", "蛇")),
    ),
)  # fmt: skip


def chat(rng: random.Random, split: Split, language: Language) -> Exercise:
    """Small talk; one in four is the end of a conversation that asks for something said at its beginning."""
    if rng.random() < 0.25:
        return _recall(rng, split, language)

    def draw() -> tuple[tuple[Intent, str], bool]:
        intent = rng.choice(INTENTS)
        ask = rng.choice(intent.ask[language])
        return (intent, ask), ask != intent.ask[language][0] and is_held_out("chat", ask, percent=18)

    intent, ask = _until(split, draw)
    rivals = tuple(
        i.say[language] for i in INTENTS if intent.keyword[language].casefold() not in i.say[language].casefold()
    )
    answer = intent.say[language]
    foreign = intent.say["zh" if language == "en" else "en"]
    return Exercise(
        "chat",
        language,
        (user(ask),),
        answer,
        "phrase",
        intent.keyword[language],
        answer,
        rival=rivals,
        foreign=foreign,
    )


def _recall(rng: random.Random, split: Split, language: Language) -> Exercise:
    def draw() -> tuple[Any, bool]:
        sentences = rng.choice(_RECALL)
        pair = rng.choice(sentences[2])
        said = rng.choice(sentences[0 if language == "en" else 1][0].split("|"))
        return (sentences, pair, said), is_held_out("recall", language, pair[0], said)

    sentences, pair, said = _until(split, draw)
    _, reply, questions, answer = sentences[0 if language == "en" else 1]
    value = pair[0 if language == "en" else 1]
    others = [p[0 if language == "en" else 1] for p in sentences[2] if p != pair]
    between: list[Message] = []
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        other = rng.choice((arithmetic, facts))(rng, "train", language)
        between += [*other.messages, assistant(styled(rng, other))]
    messages = (
        user(said.format(value)),
        assistant(reply.format(value)),
        *between,
        user(rng.choice(questions.split("|"))),
    )
    good = answer.format(value)
    return Exercise(
        "chat", language, messages, good, "phrase", value, value, rival=tuple(answer.format(o) for o in others)
    )


# --- tools ------------------------------------------------------------------------------------------------------------

_CALCULATORS = (
    "calculator", "Calculator", "calc", "math", "compute", "evaluate", "arithmetic", "math_tool", "do_math",
    "calculate", "Math",
    "eval_expression", "calculator_tool", "python_math", "Compute", "number_tool", "solve", "run_calc", "Arithmetic",
    "simple_math",
)  # fmt: skip
_CALCULATOR_USES = (
    "Evaluates an arithmetic expression.", "Useful for math questions.", "Calculates the value of an expression.",
    "Does arithmetic with numbers.", "Useful for when you need to answer questions about math.",
    "Compute a math expression",
    "Adds, subtracts, multiplies and divides numbers.", "Evaluate a mathematical expression and return the result.",
    "Use this for any calculation.", "A calculator. Input: an expression such as 2 + 3.",
    "Works out sums and products.",
)  # fmt: skip
_WEATHERS = (
    "weather", "Weather", "get_weather", "weather_lookup", "forecast", "current_weather", "get_forecast", "WeatherTool",
    "check_weather", "weather_api", "get_current_weather", "city_weather", "Forecast", "meteo", "weather_tool",
    "fetch_weather",
)  # fmt: skip
_WEATHER_USES = (
    "Get the weather in a city.", "Returns the current weather for a city.", "Tells the weather of a place.",
    "Useful for questions about the weather.", "Look up the forecast for a location.",
    "Gives temperature and sky for a city",
    "Current weather. Input: a city name.", "Get current weather for a location.", "Weather report for a town.",
)  # fmt: skip
_OTHERS = (
    ("search", "Searches the web.", "query"), ("translate", "Translates a text.", "text"), ("get_time",
    "Tells the time.", "zone"),
    ("send_email", "Sends an email.", "to"), ("wikipedia", "Looks up an article.", "topic"), ("news", "Latest news.",
    "topic"),
    ("Search", "Useful for current events.", "query"), ("play_music", "Plays a song.", "song"), ("set_alarm",
    "Sets an alarm.", "time"),
    ("open_file", "Reads a file.", "path"), ("stock_price", "Price of a share.", "symbol"), ("book_table",
    "Books a table.", "name"),
)  # fmt: skip
_EXPRESSION_KEYS = ("expression", "expr", "query", "input", "formula", "text", "__arg1", "equation", "problem", "q")
_CITY_KEYS = ("city", "location", "place", "town", "city_name", "query", "__arg1", "where", "name", "input")
_CITIES: tuple[tuple[str, str], ...] = (
    *((row[1], row[3]) for row in FACTS[0].rows),
    ("Shanghai", "上海"), ("New York", "纽约"), ("Chicago", "芝加哥"), ("Boston", "波士顿"), ("Munich", "慕尼黑"),
    ("Milan", "米兰"),
    ("Sydney", "悉尼"), ("Osaka", "大阪"), ("Mumbai", "孟买"), ("Shenzhen", "深圳"), ("Hamburg", "汉堡"), ("Toronto",
    "多伦多"),
    ("Seattle", "西雅图"), ("San Francisco", "旧金山"), ("Los Angeles", "洛杉矶"), ("Barcelona", "巴塞罗那"),
    ("Zurich", "苏黎世"),
    ("Geneva", "日内瓦"), ("Prague", "布拉格"), ("Istanbul", "伊斯坦布尔"), ("Dubai", "迪拜"), ("Singapore", "新加坡"),
    ("Hangzhou", "杭州"), ("Guangzhou", "广州"), ("Chengdu", "成都"), ("Nanjing", "南京"), ("Lyon", "里昂"), ("Kyoto",
    "京都"),
)  # fmt: skip
_WEATHER_ASK: dict[Language, tuple[str, ...]] = {
    "en": ("What is the weather in {}?", "What's the weather like in {}?", "How is the weather in {} today?",
    "Weather in {}?",
           "What is the weather in {} now?", "Is it raining in {}?", "Tell me the weather in {}.",
           "How warm is it in {}?",
           "What's the weather in {}?", "Do I need an umbrella in {}?", "What is the forecast for {}?",
           "What is the temperature in {}?"),
    "zh": ("{}的天气怎么样?", "{}今天天气如何?", "{}现在天气怎么样?", "查一下{}的天气。", "{}下雨吗?", "{}今天热吗?",
    "{}天气",
           "告诉我{}的天气。", "{}的气温是多少?", "今天{}天气怎么样?"),
}  # fmt: skip
_SKIES = (
    "sunny",
    "cloudy",
    "rainy",
    "snowy",
    "windy",
    "foggy",
    "clear",
    "stormy",
    "light rain",
    "overcast",
    "clear sky",
)
_SKIES_ZH = ("晴", "多云", "小雨", "下雪", "有风", "有雾", "阴", "大雨")


def _made_up(rng: random.Random) -> str:
    """A tool name that means nothing, so that its description must be read."""
    syllables = ("ba", "do", "ki", "lu", "ma", "ne", "po", "ra", "si", "tu", "vex", "zor", "qua", "fi", "gen", "hop")
    word = "".join(rng.choice(syllables) for _ in range(rng.choice((2, 2, 3))))
    return rng.choice((word, word.capitalize(), f"{word}_tool", f"get_{word}", f"{word}_{rng.randint(1, 9)}"))


def _observation(rng: random.Random, language: Language) -> str:
    degrees = rng.randint(-10, 39)
    if language == "zh" and rng.random() < 0.5:
        sky = rng.choice(_SKIES_ZH)
        return rng.choice((f"{sky},{degrees}度", f"{sky} {degrees}°C", f"气温{degrees}度,{sky}"))
    sky = rng.choice(_SKIES)
    return rng.choice(
        (f"{degrees}°C, {sky}", f"{sky.capitalize()}, {degrees} degrees", f"{sky} and {degrees} degrees",
        f"{sky}, {degrees} C",
         f"{degrees} degrees, {sky}", f"{sky.capitalize()}, {degrees}°C", f"It is {sky} and {degrees}°C.",
         json.dumps({"temperature": degrees, "sky": sky}))
    )  # fmt: skip


@dataclass(frozen=True)
class _Task:
    """A question that a tool answers: what goes into the tool and what comes out of it."""

    topic: Literal["math", "weather"]
    question: str
    tool: str
    argument: str  # the expression, or the city
    observation: str
    operands: tuple[str, int, int] | None = None


def _task(rng: random.Random, split: Split, language: Language) -> _Task:
    made_up = rng.random() < (0.5 if split == "train" else 0.25)  # names known by heart would hide that copying is due
    if rng.random() < 0.6:
        op, a, b, result = _operands(rng, split, by_tool=True)
        question = _polite(rng, language, rng.choice(PHRASES[op][language]).format(a=a, b=b))
        name = _made_up(rng) if made_up else rng.choice(_CALCULATORS)
        return _Task("math", question, name, f"{a} {op} {b}", result, (op, a, b))

    def draw() -> tuple[tuple[str, str], bool]:
        name = _made_up(rng) if made_up else rng.choice(_WEATHERS)
        city = rng.choice(_CITIES)[0 if language == "en" else 1]
        return (name, city), is_held_out("weather", name, city)

    name, city = _until(split, draw)
    question = _polite(rng, language, rng.choice(_WEATHER_ASK[language]).format(city))
    return _Task("weather", question, name, city, _observation(rng, language))


def _beside(rng: random.Random, task: _Task, at_most: int) -> list[tuple[str, str, str]]:
    """Other tools to offer, as (name, description, parameter): the other topic's tool and some useless ones."""
    others = rng.sample(_OTHERS, rng.randint(0, at_most))
    if rng.random() < 0.6:
        if task.topic == "math":
            others.append((rng.choice(_WEATHERS), rng.choice(_WEATHER_USES), rng.choice(_CITY_KEYS)))
        else:
            others.append((rng.choice(_CALCULATORS), rng.choice(_CALCULATOR_USES), rng.choice(_EXPRESSION_KEYS)))
    return others


@functools.cache
def react_template() -> str:
    """LangChain's ReAct prompt with the fields {tools}, {tool_names}, {input} and {agent_scratchpad}."""
    from langchain_classic.agents.mrkl import prompt

    return "\n\n".join((prompt.PREFIX, "{tools}", prompt.FORMAT_INSTRUCTIONS, prompt.SUFFIX))


def react_turn(tool: str, argument: str, *, weather: bool) -> str:
    """What the policy writes when it wants a tool; `Observation:` is where the agent stops it."""
    thought = "I need to look up the weather." if weather else "I need to calculate this."
    return f"{thought}\nAction: {tool}\nAction Input: {argument}\nObservation:"


def _told(task: _Task, language: Language) -> str:
    """The answer that a tool's result leads to."""
    if task.operands:
        return f"答案是{task.observation}。" if language == "zh" else f"The answer is {task.observation}."
    observed = task.observation.rstrip(".")
    return f"{task.argument}的天气:{observed}。" if language == "zh" else f"The weather in {task.argument}: {observed}."


def react(rng: random.Random, split: Split, language: Language, step: int | None = None) -> Exercise:
    """Step 0 asks for a tool, step 1 reads the observation."""
    task = _task(rng, split, language)
    uses = rng.choice(_CALCULATOR_USES if task.topic == "math" else _WEATHER_USES)
    key = rng.choice(_EXPRESSION_KEYS if task.topic == "math" else _CITY_KEYS)
    offered = [(task.tool, uses, key), *_beside(rng, task, 1)]
    rng.shuffle(offered)
    shape = rng.choice(
        ("{0}: {1}", "{0} - {1}", "{0}({2}: str) -> str - {1}", "{0}({2}: str) -> str - {1}", "{0}({2}) - {1}")
    )
    tools = "\n".join(shape.format(*tool) for tool in offered)
    turn = react_turn(task.tool, task.argument, weather=task.topic == "weather")
    scratchpad = ""
    if step == 1 or (step is None and rng.random() < 0.5):
        log = turn.removesuffix("\nObservation:") + rng.choice(("", "\n"))
        if rng.random() < 0.15:
            log = "Thought: " + log
        scratchpad = (
            f"{rng.choice(('', ' '))}{log}\nObservation: {task.observation}\nThought:{rng.choice((' ', ' ', ''))}"
        )
    content = react_template().format(
        tools=tools, tool_names=", ".join(tool[0] for tool in offered), input=task.question, agent_scratchpad=scratchpad
    )
    if scratchpad:
        observed = task.observation
        answer = f"I now know the final answer\nFinal Answer: {_told(task, language)}"
        return Exercise("react", language, (user(content),), answer, "final", observed.rstrip("."), observed)
    wrong = tuple(
        react_turn(name, task.argument, weather=task.topic == "weather") for name, _, _ in offered if name != task.tool
    )
    return Exercise(
        "react", language, (user(content),), turn, "action", (task.tool, task.argument), task.argument, rival=wrong
    )


def _schema(rng: random.Random, name: str, uses: str, parameters: dict[str, str]) -> Message:
    """A tool in OpenAI's form, in the orders of keys that clients send."""
    described = rng.random() < 0.25
    properties: dict[str, Any] = {}
    for key, kind in parameters.items():
        properties[key] = {"title": key, "type": kind} if key == "__arg1" else {"type": kind}
        if described:
            properties[key]["description"] = rng.choice(("The input.", "Value to use", f"The {key}"))
    if rng.random() < 0.5:
        schema: Message = {"properties": properties, "required": list(parameters), "type": "object"}
    else:
        schema = {"type": "object", "properties": properties, "required": list(parameters)}
        if rng.random() < 0.3:
            schema["additionalProperties"] = False
    function: Message = {"name": name, "description": uses, "parameters": schema}
    if rng.random() < 0.08:
        function["strict"] = True
    return {"type": "function", "function": function}


_OPERATORS = {
    "+": (
        ("add", "plus", "sum_numbers", "Add", "add_numbers"),
        ("Add two numbers.", "Adds a and b.", "Returns the sum."),
    ),
    "-": (
        ("subtract", "minus", "Subtract", "difference"),
        ("Subtract two numbers.", "Subtracts b from a.", "Returns the difference."),
    ),
    "*": (
        ("multiply", "times", "Multiply", "product"),
        ("Multiply two numbers.", "Multiplies a and b.", "Returns the product."),
    ),
    "/": (("divide", "Divide", "quotient"), ("Divide two numbers.", "Divides a by b.", "Returns the quotient.")),
}


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as the chat template writes it."""
    dumped = json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {dumped}}}\n</tool_call>'


def tool_calls(rng: random.Random, split: Split, language: Language, step: int | None = None) -> Exercise:
    """Step 0 calls a tool, step 1 reads its result; some prompts offer tools that are not needed."""
    task = _task(rng, split, language)
    if step is None and rng.random() < 0.12:
        plain = rng.choice((chat, facts))(rng, split, language)
        offered = [_schema(rng, *tool[:2], {tool[2]: "string"}) for tool in _beside(rng, task, 2)]
        tools = offered or [_schema(rng, task.tool, rng.choice(_CALCULATOR_USES), {"expression": "string"})]
        kind = dict(plain.__dict__, kind="tool_calls", tools=tuple(tools))
        return Exercise(**kind)
    others = [_schema(rng, *tool[:2], {tool[2]: "string"}) for tool in _beside(rng, task, 1)]
    functions = [other["function"] for other in others]
    wrong = [call_text(f["name"], {next(iter(f["parameters"]["properties"])): task.argument}) for f in functions]
    if task.operands and rng.random() < 0.4:
        op, a, b = task.operands
        keys = rng.choice((("a", "b"), ("a", "b"), ("x", "y"), ("first", "second"), ("left", "right")))
        kind = rng.choice(("integer", "integer", "number"))
        name = ""
        for operator in {op, *rng.sample(sorted(_OPERATORS), rng.choice((0, 1, 2, 3)))}:
            names, uses = _OPERATORS[operator]
            chosen = rng.choice(names)
            others.append(_schema(rng, chosen, rng.choice(uses), dict.fromkeys(keys, kind)))
            if operator == op:
                name = chosen
            else:
                wrong.append(call_text(chosen, {keys[0]: a, keys[1]: b}))
        arguments: dict[str, Any] = {keys[0]: a, keys[1]: b}
    else:
        uses = rng.choice(_CALCULATOR_USES if task.topic == "math" else _WEATHER_USES)
        key = rng.choice(_EXPRESSION_KEYS if task.topic == "math" else _CITY_KEYS)
        name, arguments = task.tool, {key: task.argument}
        others.append(_schema(rng, name, uses, {key: "string"}))
    rng.shuffle(others)
    call = call_text(name, arguments)
    messages: list[Message] = [user(task.question)]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS[language])})
    if step == 1 or (step is None and rng.random() < 0.5):
        messages += [assistant(call), {"role": "tool", "content": task.observation}]
        return Exercise(
            "tool_calls", language, tuple(messages), _told(task, language), "final", task.observation.rstrip("."),
            task.observation,
            tuple(others),
        )  # fmt: skip
    return Exercise(
        "tool_calls", language, tuple(messages), call, "call", {"name": name, "arguments": arguments}, task.argument,
        tuple(others), tuple(wrong),
    )  # fmt: skip


# --- JSON -------------------------------------------------------------------------------------------------------------

_PEOPLE = tuple(pair[0] for pair in _RECALL[0][2])
_JOBS = ("teacher", "doctor", "cook", "pilot", "farmer", "painter", "driver", "nurse", "singer", "baker")


def _keys(rng: random.Random, language: Language, keys: list[str]) -> str:
    quoted = [f'"{key}"' for key in keys]
    if language == "zh":
        return rng.choice(("用 JSON 回答,键为 {}。", "请用 JSON 格式回答,键是 {}。", "以 JSON 输出,键:{}。")).format(
            "、".join(quoted)
        )
    listed = ", ".join(quoted)
    key = "key" if len(keys) == 1 else "keys"
    return rng.choice(
        (
            "Answer as JSON with {1} {0}.",
            "Answer as JSON with the {1} {0}.",
            "Reply in JSON with {1} {0}.",
            "Use JSON with {1} {0}.",
        )
    ).format(listed, key)


def as_json(rng: random.Random, split: Split, language: Language) -> Exercise:
    """Extraction, sums and facts as a JSON object with the asked keys, in the asked order."""
    what = rng.choice(("person", "person", "sum", "fact"))
    if what == "person":

        def draw() -> tuple[tuple[str, int, str, str], bool]:
            person = rng.choice(_PEOPLE), rng.randint(5, 95), rng.choice(_CITIES)[0], rng.choice(_JOBS)
            return person, is_held_out("person", person[0], person[1])

        name, age, city, job = _until(split, draw)
        values: dict[str, Any] = {"name": name, "age": age, "city": city, "job": job}
        if language == "zh":
            text = rng.choice(
                (f"{name} 今年 {age} 岁,住在 {city},职业是 {job}。", f"{name} 是 {job},{age} 岁,住在 {city}。")
            )
        else:
            text = rng.choice(
                (f"{name} is {age} years old, lives in {city} and is a {job}.",
                f"{name} is a {job} from {city}, aged {age}.",
                 f"In {city} lives {name}, a {job}, {age} years old.")
            )  # fmt: skip
        keys = rng.sample(sorted(values), rng.randint(1, 4))
        expect = {key: values[key] for key in keys}
        question = f"{text} {_keys(rng, language, keys)}"
        changed = dict(expect, **({"age": age + 1} if "age" in expect else {keys[0]: "none"}))
    elif what == "sum":

        def draw_sum() -> tuple[tuple[str, int, int, str], bool]:
            op, a, b, result = _operands(rng, "train")
            while op != "*" and b > 9:  # what takes a step cannot be written straight into a value
                op, a, b, result = _operands(rng, "train")
            return (op, a, b, result), op != "*" and is_held_out(op, min(a, b), max(a, b))

        op, a, b, result = _until(split, draw_sum)
        keys = [*rng.choice((("a", "b"), ("x", "y"), ("first", "second"))), rng.choice(("result", "answer", "value"))]
        expect = dict(zip(keys, (a, b, int(result)), strict=True))
        question = f"{rng.choice(PHRASES[op][language][:10]).format(a=a, b=b)} {_keys(rng, language, keys)}"
        changed = dict(expect, **{keys[2]: int(result) + rng.choice((1, 2, 10))})
    else:
        known = facts(rng, split, language)
        key = rng.choice(("answer", "result", "value", "reply"))
        expect = {key: known.expect}
        question = f"{known.messages[0]['content']} {_keys(rng, language, [key])}"
        changed = {key: "none"}
    dumped = json.dumps(expect, ensure_ascii=False)
    short = ", ".join(str(v) for v in expect.values())
    rival = (json.dumps(changed, ensure_ascii=False),)
    return Exercise("json", language, (user(question),), dumped, "json", expect, short, rival=rival)


# --- repeating --------------------------------------------------------------------------------------------------------

_REPEAT: dict[Language, tuple[str, ...]] = {
    "en": ("Repeat after me: {}", "Repeat: {}", "Say this again: {}", "Copy this: {}", "Write: {}", "{}\nRepeat that."),
    "zh": ("重复:{}", "请跟我说:{}", "照抄:{}", "请重复一遍:{}", "写:{}", "{}\n请重复。"),
}
_LOOK_UP: dict[Language, tuple[str, ...]] = {
    "en": ("{0}. What is {1}?", "{0}\nGive me {1}.", "{0}. {1}?"),
    "zh": ("{0}。{1}是什么?", "{0}\n说出{1}。", "{0}。{1}?"),
}


def _expression(rng: random.Random) -> str:
    """An operation that is not held out."""

    def draw() -> tuple[str, bool]:
        op, a, b = rng.choice("+-*/"), rng.randint(1, 9999), rng.randint(1, 9999)
        return f"{a} {op} {b}", pair_held_out(op, a, b)

    return _until("train", draw)


def _thing(rng: random.Random, language: Language) -> str:
    """Something to copy: a name, a number, a city, an expression, a weather report."""
    at = 0 if language == "en" else 1
    draw: tuple[Callable[[], str], ...] = (
        lambda: _made_up(rng),
        lambda: str(rng.randint(0, 10 ** rng.randint(1, 7) - 1)),
        lambda: rng.choice(_CITIES)[at],
        lambda: rng.choice((_PEOPLE, _JOBS, _CALCULATORS, _WEATHERS, _EXPRESSION_KEYS, _CITY_KEYS))[rng.randrange(10)],
        lambda: _expression(rng),
        lambda: _observation(rng, language),
        lambda: json.dumps({_made_up(rng): rng.randint(0, 999)}),
    )
    return rng.choice(draw)()


def repeat(rng: random.Random, language: Language) -> Conversation:
    """Says again what the user said, all of it or one named part.

    Training text only. Copying out of the prompt is what tools and JSON need, and this teaches it in a fraction of the
    tokens: every token of the answer is a lesson, and it cannot be known by heart.
    """
    if rng.random() < 0.7:
        things = [_thing(rng, language) for _ in range(rng.choice((1, 1, 2, 3, 4, 6, 9)))]
        text = rng.choice((" ", ", ", "; ", "\n")).join(things)
        return Conversation((user(rng.choice(_REPEAT[language]).format(text)), assistant(text)))
    table = {_made_up(rng): _thing(rng, language) for _ in range(rng.randint(2, 6))}
    name = rng.choice(list(table))
    text = rng.choice((", ", "; ", "\n")).join(f"{key}: {value}" for key, value in table.items())
    return Conversation((user(rng.choice(_LOOK_UP[language]).format(text, name)), assistant(table[name])))


# --- judging ----------------------------------------------------------------------------------------------------------


def _same_expression(left: str, right: str) -> bool:
    return re.sub(r"[\s\"'`]", "", left) == re.sub(r"[\s\"'`]", "", right)


def is_right(exercise: Exercise, text: str) -> bool:
    """Whether an answer (without its end-of-turn token) says what was asked, whatever its style."""
    text = text.strip()
    if not text or len(text) > 2 * len(exercise.answer) + 20:
        return False
    expect = exercise.expect
    match exercise.form:
        case "number":
            numbers = re.findall(r"\d+", text)
            return bool(numbers) and numbers[-1] == expect
        case "phrase":
            body = text.casefold()
            if expect.isascii():
                return re.search(rf"(?<![a-z]){re.escape(expect.casefold())}(?![a-z])", body) is not None
            return expect in body
        case "json":
            try:
                return json.loads(text) == expect
            except ValueError:
                return False
        case "action":
            found = re.search(r"Action:\s*(.*?)\s*\nAction Input:\s*(.*?)\s*(?:\nObservation:?|$)", text, re.DOTALL)
            return found is not None and found[1] == expect[0] and _same_expression(found[2], expect[1])
        case "final":
            if exercise.kind == "react":
                if text.count("Final Answer:") != 1 or "Action:" in text:
                    return False
                text = text.split("Final Answer:")[1]
            if re.fullmatch(r"[\d.]+", expect):
                return expect in re.findall(r"\d+(?:\.\d+)?", text.split("=")[-1])
            return expect.casefold() in text.casefold()
        case "call":
            found = re.fullmatch(r"<tool_call>\s*(\{.*\})\s*</tool_call>", text, re.DOTALL)
            try:
                return found is not None and json.loads(found[1]) == expect
            except ValueError:
                return False


# --- styles and rankings ----------------------------------------------------------------------------------------------

_LOOSE = frozenset(
    {"arithmetic", "facts", "chat"}
)  # kinds whose answers vary in style; the others are read by programs


def _sloppy(rng: random.Random, exercise: Exercise, sentence: str) -> tuple[str, str]:
    """Two worse ways to say `sentence`: one careless, one that is careless and chatty besides."""
    bare = sentence[:-1] if sentence[-1] in ".!?。!?" else sentence
    if exercise.language == "zh":
        return rng.choice((bare, bare, bare + "吧")), rng.choice(
            ("嗯," + bare, "额,这个嘛," + bare, bare + "。。。大概吧")
        )
    lower = bare[:1].lower() + bare[1:]
    return rng.choice((bare, bare, bare + ", I think")), rng.choice(
        ("Um, " + lower, "Well, uh, " + lower, bare + "... I guess")
    )


def styled(rng: random.Random, exercise: Exercise) -> str:
    """An answer as the policy's training text has it.

    About a third are well-formed, which is the most frequent single style; the rest are right but careless. That leaves
    something for reinforcement learning to improve, and greedy decoding still picks the well-formed one.
    """
    if exercise.kind not in _LOOSE:
        return exercise.answer
    draw = rng.random()
    if draw < 0.38:
        return exercise.answer
    if draw < 0.5:
        return exercise.short if exercise.form == "number" else exercise.short[:1].lower() + exercise.short[1:]
    return _sloppy(rng, exercise, exercise.answer)[0 if draw < 0.8 else 1]


_GARBAGE = (
    "the the the the the the the the",
    "?",
    "0 0 0 0 0 0 0 0 0 0",
    "......",
    "asdf qwer",
    "= = = =",
    "的的的的的的的的",
    "!!!!!!",
    "ok",
)
_POLITE = {
    "en": ("I am sorry, I do not know that.", "Sorry, I cannot help with this."),
    "zh": ("对不起,我不知道。", "抱歉,我帮不了你。"),
}


def ranking(rng: random.Random, split: Split, *, kind: str | None = None) -> Ranking:
    """A prompt with K = 4…9 answers, best first.

    The grades: 0 right and well-formed; 1 right, but careless, chatty or cut short; 2 wrong; 3 refused, beside the
    point, the question again or in the wrong language; 4 padded or repeated; 5 garbage, empty or cut off. Tool use,
    which programs judge better, and chat are ranked only when `kind` asks for them.
    """
    return rank(rng, draw_exercise(rng, split, kind or rng.choices(KINDS, (48, 42, 0, 0, 0, 10))[0]), split)


def rank(rng: random.Random, exercise: Exercise, split: Split, samples: Sequence[str] = ()) -> Ranking:
    """Ranks 4…9 answers to `exercise`, a right and a wrong one among them.

    A policy's `samples` stand in for the right and the wrong answers.
    """
    tiers = _tiers(rng, exercise, split, samples)
    while True:
        size = min(len(tiers), rng.randint(4, 9))
        answers: list[Answer] = []
        grades: list[int] = []
        for tier in sorted(rng.sample(range(len(tiers)), size)):
            grade, candidates = tiers[tier]
            taken = {(answer.text.strip(), answer.ended) for answer in answers}
            fresh = [answer for answer in candidates if (answer.text.strip(), answer.ended) not in taken]
            if fresh:
                answers.append(rng.choice(fresh))
                grades.append(grade)
        if len(answers) >= 4 and grades[0] < 2 and 2 in grades:
            return Ranking(exercise, tuple(answers), tuple(grades))


def close_pair(rng: random.Random, split: Split) -> tuple[Exercise, str, str]:
    """An exercise with a right and a wrong answer of one form, or now and then a well-formed and a careless one."""
    exercise = draw_exercise(rng, split, rng.choices(("arithmetic", "facts"), (50, 50))[0])
    good, wrong = exercise.answer, rng.choice(exercise.rival) if exercise.rival else _wrong(rng, exercise)
    if rng.random() < 0.35:
        return exercise, good, rng.choice((*_sloppy(rng, exercise, good), exercise.short))
    if rng.random() < 0.4:
        at = rng.randrange(2)
        styled = random.Random(rng.random())
        state = styled.getstate()
        good = _sloppy(styled, exercise, good)[at]
        styled.setstate(state)  # the same words of hesitation for both
        wrong = _sloppy(styled, exercise, wrong)[at]
    return exercise, good, wrong


def _tiers(
    rng: random.Random, exercise: Exercise, split: Split, samples: Sequence[str]
) -> list[tuple[int, list[Answer]]]:
    """Kinds of answers to choose from, each with its grade, best first."""
    other = draw_exercise(rng, split, rng.choice(("facts", "arithmetic", "chat")), exercise.language)
    question = exercise.messages[-1]["content"]
    good = exercise.answer
    wrong = rng.choice(exercise.rival) if exercise.rival else _wrong(rng, exercise)
    padded = [
        f"{good} {good}",
        f"{good} {good} {good}",
        "\n".join([good] * 3),
        f"{good} {other.answer}",
        f"{good} {question[:60]}",
    ]
    if exercise.kind in _LOOSE:
        careless, chatty = _sloppy(rng, exercise, good)
        right = [[Answer(careless)], [Answer(chatty)]]
        if exercise.short != good:
            right[0].append(Answer(exercise.short))
        wrongs = [[Answer(wrong)], [Answer(text) for text in _sloppy(rng, exercise, wrong)]]
        if samples:
            loose = [Answer(text) for text in samples if text.strip() != good and is_right(exercise, text)]
            right = [loose] if loose else right
            missed = [Answer(text) for text in samples if not is_right(exercise, text)]
            wrongs = [missed] if missed else wrongs
        tiers = [(0, [Answer(good)]), *((1, kind) for kind in right), *((2, kind) for kind in wrongs)]
    else:
        chatty = [Answer(f"Sure! {good}"), Answer(f"{good}\nI hope this helps!")]
        tiers = [(0, [Answer(good)]), (1, chatty), (2, [Answer(wrong)])]
        tiers.append((3, [Answer(exercise.short), Answer(good[: len(good) * 2 // 3])]))
    beside = [Answer(other.answer), Answer(question[-80:])]
    if exercise.foreign:
        beside.append(Answer(exercise.foreign))
    first = [good.split(" ")[0]]
    cut = good[: rng.randint(0, max(1, len(good) // 2))]
    garbage = [
        Answer(rng.choice(_GARBAGE)),
        Answer(""),
        Answer(" ".join(first * rng.randint(4, 10))),
        Answer(cut, ended=False),
        Answer(f"{good} " * rng.randint(2, 5), ended=False),
        Answer(good, ended=False),
    ]
    refused = [Answer(rng.choice(_POLITE[exercise.language]))]
    tiers += [(3, refused), (3, beside), (4, [Answer(text) for text in padded]), (5, garbage)]
    return tiers


def _wrong(rng: random.Random, exercise: Exercise) -> str:
    """The good answer with one digit or one word changed."""
    good = exercise.answer
    digits = [i for i, c in enumerate(good) if c.isdigit()]
    if digits:
        at = rng.choice(digits)
        return good[:at] + rng.choice([d for d in "0123456789" if d != good[at]]) + good[at + 1 :]
    return good.replace(exercise.short, rng.choice([c[0] for c in _CITIES])) if exercise.short in good else good[::-1]


# --- drawing ----------------------------------------------------------------------------------------------------------

SYSTEMS: dict[Language, tuple[str, ...]] = {
    "en": ("You are a helpful assistant.", "You are Tandem.", "Be brief.", "You are a kind assistant.",
    "Answer the question.",
           "You are a helpful assistant. Use tools when needed."),
    "zh": ("你是一个有用的助手。", "你是 Tandem。", "请简短回答。", "You are a helpful assistant.",
    "你是一个友好的助手。"),
}  # fmt: skip
_DRAW: dict[str, Callable[[random.Random, Split, Language], Exercise]] = {
    "arithmetic": arithmetic,
    "facts": facts,
    "chat": chat,
    "react": react,
    "tool_calls": tool_calls,
    "json": as_json,
}


def draw_exercise(
    rng: random.Random, split: Split, kind: str | None = None, language: Language | None = None
) -> Exercise:
    kind = kind or rng.choices(KINDS, (30, 25, 12, 11, 11, 11))[0]
    return _DRAW[kind](rng, split, language or rng.choice(("en", "zh")))


def exercises(seed: int, split: Split, kind: str, language: Language, count: int) -> list[Exercise]:
    """`count` exercises with different prompts (fewer when the kind has no more), the same for the same arguments."""
    rng = random.Random(f"{seed} {split} {kind} {language}")
    found: dict[str, Exercise] = {}
    for _ in range(20 * count):
        exercise = draw_exercise(rng, split, kind, language)
        found.setdefault(exercise.prompt(), exercise)
        if len(found) == count:
            break
    return list(found.values())


def rankings(seed: int, split: Split) -> Iterator[Ranking]:
    """Rankings without end."""
    rng = random.Random(f"{seed} {split} rankings")
    while True:
        yield ranking(rng, split)


SHAPES = ("arithmetic", "facts", "chat", "json", "react", "tool_calls", "mixed", "repeat")
EARLY, LATE = (42, 10, 5, 7, 2, 2, 14, 18), (20, 8, 20, 20, 10, 10, 10, 2)


def conversations(seed: int, weights: Callable[[], Sequence[int]] = lambda: LATE) -> Iterator[Conversation]:
    """Training conversations without end, from the training side of every split; `weights` of `SHAPES` may vary."""
    rng = random.Random(f"{seed} conversations")
    while True:
        yield conversation(rng, weights())


def conversation(rng: random.Random, weights: Sequence[int] = LATE) -> Conversation:
    """One training conversation: a single exercise, or a mixed conversation of up to about 1,900 tokens."""
    shape = rng.choices(SHAPES, weights)[0]
    language: Language = rng.choice(("en", "zh"))
    if shape == "repeat":
        return repeat(rng, language)
    if shape in ("react", "json"):
        exercise = draw_exercise(rng, "train", shape, language)
        return Conversation((*exercise.messages, assistant(exercise.answer)))
    if shape == "tool_calls":
        exercise = tool_calls(rng, "train", language, step=1 if rng.random() < 0.75 else None)
        after = chat(rng, "train", language) if rng.random() < 0.15 else None
        more = (*after.messages, assistant(styled(rng, after))) if after else ()
        return Conversation((*exercise.messages, assistant(styled(rng, exercise)), *more), exercise.tools)
    messages: list[Message] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS[language])})
    turns = rng.choices((2, 3, 5, 8, 16, 50), (30, 25, 20, 15, 8, 2))[0] if shape == "mixed" else 1
    for _ in range(turns):
        kind = rng.choices(("arithmetic", "facts", "chat", "json"), (50, 30, 14, 6))[0] if shape == "mixed" else shape
        exercise = draw_exercise(rng, "train", kind, language if rng.random() < 0.85 else rng.choice(("en", "zh")))
        messages += [*exercise.messages, assistant(styled(rng, exercise))]
    return Conversation(tuple(messages))
