"""Text of many kinds, ours, that a model reads once before it serves: what its queries look like (key_rounding.py)."""

from typing import Any

import torch
from torch import Tensor

TOKENS = 1024
"""So many at most are read."""
LEAST_TOKENS, LEAST_KINDS = 256, 64
"""A vocabulary that makes fewer tokens of the text, or fewer different ones, does not know it."""

TEXT = """\
The harbour froze early that year. By the second week of November the ferries had stopped, and letters came by sledge, two days
late and smelling of smoke. Marta kept the post office open all the same. "People want to know that somebody is there," she said,
and put another log on the fire. Nobody asked her what she would do when the wood ran out. In the evenings she copied the names of
the senders into a brown book: Ilves, 14 parcels; Koskinen, 3; the doctor, none since March.

def moving_average(values: list[float], width: int = 5) -> list[float]:
    \"\"\"Mean of the last `width` values at every place.\"\"\"
    if width <= 0:
        raise ValueError(f"width is {width}; it must be at least 1")
    total, found = 0.0, []
    for i, value in enumerate(values):
        total += value
        if i >= width:
            total -= values[i - width]
        found.append(total / min(i + 1, width))
    return found

User: My train leaves at 17:42 and the meeting ends at five. It is 2.5 km to the station. Can I walk?
Assistant: Yes. At 5 km/h you need 30 minutes, so you arrive at about 17:30, twelve minutes before the train. If it rains, take
line 8 from the corner of Mill Street; it runs every ten minutes.
User: And if the meeting runs late?
Assistant: Then leave by 17:10 at the latest, or take a taxi (about 9 euros).

{"order": 48213, "customer": {"name": "A. Okafor", "city": "Lagos"}, "items": [{"sku": "TX-119", "count": 2, "price": 18.5},
{"sku": "QL-007", "count": 1, "price": 240.0}], "paid": true, "shipped": null, "note": "leave at the door"}

Photosynthesis turns light into chemical energy. In the first stage pigments in the thylakoid membranes absorb photons and split
water; oxygen is given off, and electrons travel along a chain of proteins. In the second stage, the Calvin cycle, the enzyme
RuBisCO binds carbon dioxide to a sugar of five carbon atoms. For every six molecules of CO2 one molecule of glucose can be made:
6 CO2 + 6 H2O -> C6H12O6 + 6 O2. Above 35 degrees the rate falls, because the enzyme binds oxygen as well.

| month | rain (mm) | sun (h) | visitors |
|-------|-----------|---------|----------|
| April | 58        | 171     | 10,340   |
| May   | 71        | 203     | 15,902   |
| June  | 64        | 226     | 21,775   |

Der Vertrag beginnt am 1. März und läuft zwei Jahre. Er verlängert sich um je zwölf Monate, wenn keine der Parteien drei Monate
vor Ablauf schriftlich kündigt. Le locataire s'engage à entretenir le jardin et à ne pas sous-louer l'appartement sans accord
écrit. La biblioteca abre de lunes a viernes, de nueve a dos; los sábados solo hay préstamo.
会议将于星期三下午三点开始，请提前十分钟到场。
Заявки принимаются до 15 сентября. お問い合わせは、平日の九時から十七時までにお願いします。

2026-03-04 09:12:55,118 WARNING pool.worker[3]: retrying job 7f3a9c (attempt 2 of 5): connection reset by peer
2026-03-04 09:12:57,902 INFO  pool.worker[3]: job 7f3a9c done in 1.84 s, 3 rows written to results.parquet
2026-03-04 09:13:00,001 ERROR scheduler: no heartbeat from 10.0.4.17 for 30 s, marking node as lost

SELECT c.name, SUM(o.total) AS spent FROM customers AS c JOIN orders AS o ON o.customer_id = c.id
WHERE o.created_at >= '2025-01-01' GROUP BY c.name HAVING SUM(o.total) > 1000 ORDER BY spent DESC LIMIT 20;

Theorem. Let f be continuous on [a, b] and differentiable on (a, b). Then there is a point c in (a, b) with
f'(c) = (f(b) - f(a)) / (b - a). Proof. The function g(x) = f(x) - f(a) - (x - a)(f(b) - f(a)) / (b - a) vanishes at both ends. If
it is constant, any c will do. Otherwise it has a maximum or a minimum inside, and there its derivative is zero.

To make the soup, soften two onions in butter, add 800 g of pumpkin in cubes and a litre of stock, and simmer for 25 minutes.
Blend it, season with salt, nutmeg and lemon, and serve with toasted seeds. It keeps for three days in the
fridge, and freezes well. Marta wrote the recipe on the last page of the brown book, under the doctor's name.
"""


def text_tokens(tokenizer: Any, longest: int) -> Tensor | None:
    """[at most `longest` tokens] int64 of `TEXT`; None where there is no tokenizer, or one that does not know such text."""
    ids = [] if tokenizer is None else tokenizer.encode(TEXT)[: min(TOKENS, longest)]
    if len(ids) < LEAST_TOKENS or len(set(ids)) < LEAST_KINDS:
        return None
    return torch.tensor(ids)
