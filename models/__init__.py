"""Model families for one device: pure torch modules, their specs and their parallel layout as data.

Shape legend. Tensors carry their logical dimensions as a suffix, whatever the sharding:
    B batch, T query positions, S key positions, D model width, N query heads, K key/value heads,
    H head size, F MLP width, V vocabulary, X rows of a flattened batch (B*T).
"""
