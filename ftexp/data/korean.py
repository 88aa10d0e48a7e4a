"""Korean sentences in the polite formal style and the same in the plain style of books, from a small grammar of ours.

| polite                              | plain                            |
|-------------------------------------|----------------------------------|
| 저는 학교에서 책을 읽습니다.        | 나는 학교에서 책을 읽는다.       |
| 선생님은 어제 시장에서 꽃을 샀습니다. | 선생님은 어제 시장에서 꽃을 샀다. |

Particles follow the last sound of their noun (은/는, 을/를). One right answer exists for each sentence, so exact match
is a fair score.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

SUBJECTS = [
    "친구",
    "선생님",
    "동생",
    "할머니",
    "의사",
    "학생",
    "가수",
    "형",
    "이웃",
    "사촌",
    "화가",
    "농부",
    "기자",
    "요리사",
]
PLACES = ["학교", "시장", "도서관", "집", "공원", "바닷가", "회사", "부엌", "정원", "마을", "극장", "산"]
OBJECTS = {  # verb: present polite, present plain, past without its end -> what it is done to
    ("읽습니다", "읽는다", "읽었"): ["책", "신문", "편지", "소설", "시", "잡지"],
    ("먹습니다", "먹는다", "먹었"): ["밥", "사과", "국수", "빵", "김치", "떡"],
    ("마십니다", "마신다", "마셨"): ["물", "차", "커피", "우유", "주스"],
    ("씁니다", "쓴다", "썼"): ["편지", "일기", "시", "소설", "보고서"],
    ("봅니다", "본다", "봤"): ["영화", "연극", "사진", "하늘", "바다"],
    ("만듭니다", "만든다", "만들었"): ["의자", "인형", "음식", "연", "빵"],
    ("삽니다", "산다", "샀"): ["꽃", "옷", "신발", "과일", "가방", "책"],
    ("팝니다", "판다", "팔았"): ["생선", "그림", "옷", "채소", "꽃"],
    ("찾습니다", "찾는다", "찾았"): ["열쇠", "지갑", "길", "안경", "책"],
    ("그립니다", "그린다", "그렸"): ["그림", "나무", "얼굴", "지도", "꽃"],
    ("배웁니다", "배운다", "배웠"): ["노래", "춤", "요리", "한국어", "수영"],
    ("고칩니다", "고친다", "고쳤"): ["시계", "자전거", "의자", "문", "지붕"],
}
NOW = ["", "", "오늘 ", "지금 ", "자주 ", "가끔 ", "매일 ", "천천히 ", "혼자 "]
THEN = ["", "어제 ", "지난주에 ", "아침에 ", "작년에 ", "조용히 ", "열심히 "]


def closed(noun: str) -> bool:
    """Tell whether a noun ends in a consonant, by the order of Hangul syllables in Unicode (section 3.12).

    >>> closed("책"), closed("의자")
    (True, False)
    """
    return (ord(noun[-1]) - 0xAC00) % 28 > 0


def topic(noun: str) -> str:
    """Add the particle of the topic.

    >>> topic("학생"), topic("친구")
    ('학생은', '친구는')
    """
    return noun + ("은" if closed(noun) else "는")


def thing(noun: str) -> str:
    """Add the particle of the object.

    >>> thing("책"), thing("영화")
    ('책을', '영화를')
    """
    return noun + ("을" if closed(noun) else "를")


def pairs(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (polite, plain) pairs without end and without repeating a sentence, some 100 000 in all.

    >>> next(pairs(0))
    ('의사는 혼자 부엌에서 과일을 삽니다.', '의사는 혼자 부엌에서 과일을 산다.')
    """
    r = random.Random(seed)
    seen: set[str] = set()
    while True:
        verb = r.choice(list(OBJECTS))
        past = r.random() < 0.5
        me = r.random() < 0.15
        subject = r.choice(SUBJECTS)
        middle = f"{r.choice(THEN if past else NOW)}{r.choice(PLACES)}에서 {thing(r.choice(OBJECTS[verb]))}"
        polite, plain = (f"{verb[2]}습니다", f"{verb[2]}다") if past else verb[:2]
        asked = f"{'저는' if me else topic(subject)} {middle} {polite}."
        if asked not in seen:
            seen.add(asked)
            yield asked, f"{'나는' if me else topic(subject)} {middle} {plain}."
