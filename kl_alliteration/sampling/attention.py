"""A layer's keys and values while tokens are sampled, and the attention of one new token per row over them."""

import torch
import torch.nn.functional as F

SPLIT_FROM = 32  # prompt columns from which they are attended to apart, once for all rows that share them


class Rows:
    """Which of B rows goes on from which of U prompts, and where each row may look.

    A prompt's rows are queries of one product. Each has a slot of its own, (U * G,), G slots a prompt.
    """

    def __init__(self, attention_mask: torch.Tensor, length: int):
        """Of prompts, (U, P), left-padded, and rows of `length` tokens; one row a prompt until they are `shared`."""
        self.prompts, self.columns = attention_mask.shape
        self.padding = self.columns - attention_mask.sum(-1)  # (U,)
        self.padded = bool(self.padding.any())
        places = torch.arange(length, device=attention_mask.device)
        self.real = places >= self.padding[:, None]  # (B, L)
        self.places = (places - self.padding[:, None]).clamp(min=0) if self.padded else places[None]  # (B or 1, L)
        self.split = 0  # columns that are held once a prompt: P or none
        self.slots: torch.Tensor | None = None  # (B,); None: a row's number is its slot

    def share(self, row: torch.Tensor) -> None:
        """B rows from here on; `row` (B,) is each one's prompt."""
        sizes = row.bincount(minlength=self.prompts)
        self.group = int(sizes.max())
        self.split = self.columns if self.columns >= SPLIT_FROM and self.group > 1 else 0
        order = row.argsort(stable=True)
        places = torch.arange(len(row), device=row.device)
        within = places - (sizes.cumsum(0) - sizes)[row[order]]
        slots = torch.empty_like(row).scatter_(0, order, row[order] * self.group + within)
        in_order = len(row) == self.prompts * self.group and bool((slots == places).all())
        self.slots = None if in_order else slots
        self._pick(row)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows, (B,) booleans."""
        slots = torch.arange(len(rows), device=rows.device) if self.slots is None else self.slots
        self.slots = slots[rows]
        self._pick(rows)

    def _pick(self, rows: torch.Tensor) -> None:
        self.real = self.real[rows]
        if self.padded:
            self.places = self.places[rows]

    def to_prompts(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """(B * K, R, N) of rows -> (U * K, G * R, N) of prompts."""
        repeats, size = x.shape[1:]
        x = x.view(-1, kv_heads, repeats, size)
        if self.slots is not None:
            x = x.new_zeros(self.prompts * self.group, *x.shape[1:]).index_copy_(0, self.slots, x)
        x = x.view(self.prompts, self.group, kv_heads, repeats, size).transpose(1, 2)
        return x.reshape(self.prompts * kv_heads, self.group * repeats, size)

    def to_rows(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """(U * K, G * R, N) of prompts -> (B * K, R, N) of rows."""
        x = x.view(self.prompts, kv_heads, self.group, -1, x.shape[-1]).transpose(1, 2)
        x = x.reshape(self.prompts * self.group, *x.shape[2:])
        return (x if self.slots is None else x[self.slots]).flatten(0, 1)


class Cache:
    """Keys and values of one layer, (U, K, P, D) of prompts, then (B, K, L, D) of rows behind what is split off."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.prompts = self.own = keys, values

    def share(self, row: torch.Tensor, rows: Rows, length: int) -> None:
        """Room for `length` tokens of each row. What is not split off is repeated."""
        kept = rows.columns - rows.split
        like = self.prompts[0]
        shape = len(row), like.shape[1], length - rows.split, like.shape[3]
        self.own = like.new_empty(shape), like.new_empty(shape)
        for own, prompt in zip(self.own, self.prompts, strict=True):
            own[:, :, :kept] = prompt[row, :, :kept]

    def keep(self, rows: torch.Tensor) -> None:
        self.own = tuple(each[rows] for each in self.own)

    def attend(self, q, k, v, rows: Rows, last: int, window: int | None, scale: float) -> torch.Tensor:
        """One new token a row, its `last`: (B, heads, 1, D) and (B, K, 1, D) twice -> (B, heads * D)."""
        split, (keys, values) = rows.split, self.own
        keys[:, :, last - split - 1], values[:, :, last - split - 1] = k.squeeze(2), v.squeeze(2)
        begin = max(0, last - window) if window else 0
        batch, kv_heads, _, size = keys.shape
        seen = slice(max(0, begin - split), last - split)
        q = q.to(keys.dtype).reshape(batch * kv_heads, -1, size)
        scores = _scaled(q, keys[:, :, seen], scale)  # (B * K, R, tokens)
        of_prompts = begin < split
        if of_prompts:
            prompt_keys, prompt_values = (each[:, :, begin:split] for each in self.prompts)
            shared = _scaled(rows.to_prompts(q, kv_heads), prompt_keys, scale)
            scores = torch.cat([rows.to_rows(shared, kv_heads), scores], dim=-1)
        if rows.padded and begin < rows.columns:
            hidden = ~rows.real[:, begin:last]
            scores = scores.view(batch, -1, scores.shape[-1]).masked_fill_(hidden[:, None], -torch.inf).view_as(scores)
        p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
        if not of_prompts:
            return torch.bmm(p, values[:, :, seen].flatten(0, 1)).view(batch, -1)
        of_prompt, of_own = p.split([split - begin, p.shape[-1] - split + begin], dim=-1)
        y = torch.bmm(rows.to_prompts(of_prompt, kv_heads), prompt_values.flatten(0, 1))
        return torch.baddbmm(rows.to_rows(y, kv_heads), of_own, values[:, :, seen].flatten(0, 1)).view(batch, -1)


def _scaled(q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """(B * K, R, D) and (B, K, N, D) -> (B * K, R, N)."""
    keys = keys.flatten(0, 1).transpose(1, 2)
    return torch.baddbmm(q.new_empty(1, 1, 1), q, keys, beta=0, alpha=scale)


def attend_prompt(q, k, v, rows: Rows, window: int | None, scale: float) -> tuple[torch.Tensor, Cache]:
    """Prompts, all at once: (U, heads, P, D) and (U, K, P, D) twice -> (U * P, heads * D), and the layer's cache."""
    places = torch.arange(rows.columns, device=q.device)
    query, key = places[:, None], places[None, :]
    seen = (key <= query) & (key > query - (window or rows.columns))
    # A padded query may look at itself, so that its row of the softmax is not empty; nobody looks at it.
    seen = seen & (rows.real[:, None, None, : rows.columns] | (key == query))  # (U, 1, P, P)
    q, k = q.to(v.dtype), k.to(v.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return y.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3]), Cache(k, v)
