"""Small Python functions on request, each with a line that runs and must be true."""

# ruff: noqa: E501

import random
from collections.abc import Iterator

FUNCTIONS = (
    ("adds two numbers", "add", "a, b", "return a + b", "add(2, 3) == 5"),
    ("returns the larger of two numbers", "larger", "a, b", "return a if a > b else b", "larger(2, 7) == 7"),
    ("returns the square of a number", "square", "n", "return n * n", "square(6) == 36"),
    ("tells whether a number is even", "is_even", "n", "return n % 2 == 0", "is_even(4) and not is_even(3)"),
    ("reverses a text", "reverse", "text", "return text[::-1]", "reverse('abc') == 'cba'"),
    ("tells whether a text is a palindrome", "is_palindrome", "text", "return text == text[::-1]", "is_palindrome('level') and not is_palindrome('ab')"),
    ("counts the words of a text", "count_words", "text", "return len(text.split())", "count_words('a b c') == 3"),
    ("counts the vowels in a text", "count_vowels", "text", "return sum(letter in 'aeiou' for letter in text.lower())", "count_vowels('Hello') == 2"),
    ("sums the digits of a number", "digit_sum", "n", "return sum(int(digit) for digit in str(n))", "digit_sum(123) == 6"),
    ("returns the factorial of a number", "factorial", "n", "result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result", "factorial(5) == 120"),
    ("returns the n-th Fibonacci number", "fibonacci", "n", "a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a", "fibonacci(10) == 55"),
    ("tells whether a number is prime", "is_prime", "n", "if n < 2:\n        return False\n    for i in range(2, int(n**0.5) + 1):\n        if n % i == 0:\n            return False\n    return True", "is_prime(13) and not is_prime(15)"),
    ("returns the greatest common divisor of two numbers", "gcd", "a, b", "while b:\n        a, b = b, a % b\n    return a", "gcd(12, 18) == 6"),
    ("returns the mean of a list of numbers", "mean", "numbers", "return sum(numbers) / len(numbers)", "mean([1, 2, 3]) == 2"),
    ("returns the largest number of a list", "largest", "numbers", "best = numbers[0]\n    for number in numbers:\n        if number > best:\n            best = number\n    return best", "largest([3, 9, 4]) == 9"),
    ("sorts a list of numbers", "sort", "numbers", "return sorted(numbers)", "sort([3, 1, 2]) == [1, 2, 3]"),
    ("removes duplicates from a list", "unique", "items", "return list(dict.fromkeys(items))", "unique([1, 2, 1]) == [1, 2]"),
    ("counts how often each letter occurs in a text", "letters", "text", "counts = {}\n    for letter in text:\n        counts[letter] = counts.get(letter, 0) + 1\n    return counts", "letters('aab') == {'a': 2, 'b': 1}"),
    ("searches a sorted list by halves", "binary_search", "items, wanted", "low, high = 0, len(items) - 1\n    while low <= high:\n        middle = (low + high) // 2\n        if items[middle] == wanted:\n            return middle\n        if items[middle] < wanted:\n            low = middle + 1\n        else:\n            high = middle - 1\n    return -1", "binary_search([1, 3, 5], 5) == 2"),
    ("converts Celsius to Fahrenheit", "to_fahrenheit", "celsius", "return celsius * 9 / 5 + 32", "to_fahrenheit(100) == 212"),
)  # fmt: skip
"""What it does, its name, arguments and body, and a line about it that is true."""

CHINESE = {
    "add": "把两个数相加",
    "larger": "返回两个数中较大的一个",
    "square": "返回一个数的平方",
    "is_even": "判断一个数是不是偶数",
    "reverse": "把字符串反过来",
    "is_palindrome": "判断字符串是不是回文",
    "count_words": "数一段文字有多少个单词",
    "count_vowels": "数字符串里有几个元音",
    "digit_sum": "求一个数各位数字之和",
    "factorial": "求一个数的阶乘",
    "fibonacci": "求第 n 个斐波那契数",
    "is_prime": "判断一个数是不是质数",
    "gcd": "求两个数的最大公约数",
    "mean": "求一列数的平均值",
    "largest": "返回列表里最大的数",
    "sort": "把一列数排序",
    "unique": "去掉列表里重复的元素",
    "letters": "统计每个字母出现的次数",
    "binary_search": "在有序列表里做二分查找",
    "to_fahrenheit": "把摄氏度换成华氏度",
}
ENGLISH_REQUESTS = (
    "Write a Python function that {}.",
    "Write a function that {}",
    "In Python, write a function `{name}` that {}.",
)
CHINESE_REQUESTS = ("写一个 Python 函数，{}。", "用 Python {}", "写一个函数 {name}，{}")


def code(name: str, arguments: str, body: str) -> str:
    """Return the source of a function."""
    return f"def {name}({arguments}):\n    {body}"


def requests(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (request, function) in every wording, in an order that `rng` shuffles."""
    pairs: list[tuple[str, str]] = []
    for purpose, name, arguments, body, _ in FUNCTIONS:
        made, chinese = code(name, arguments, body), CHINESE[name]
        pairs += [(wording.format(purpose, name=name), made) for wording in ENGLISH_REQUESTS]
        pairs += [(wording.format(chinese, name=name), made) for wording in CHINESE_REQUESTS]
    rng.shuffle(pairs)
    yield from pairs
