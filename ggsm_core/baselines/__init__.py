"""What the paper's encoder is compared with: one file a system, one interface (``base.Baseline``).

| stage | systems | learn from |
| --- | --- | --- |
| ``features`` | rfm, handmade, handmade_linear, handmade_128 | counts and sums of the history |
| ``sequence`` | cpc, coles, msdp, one4all | visits of the history, as a sequence |
| ``language`` | found, instructue | records and answers, as our own encoder does |
| ``text_embeddings`` | minilm, qwen3_embedding, kalm, nemotron | nothing: frozen |
| ``records`` | records | the records that our encoder is given, as numbers |
| ``joined`` | handmade+<row> | the hand-made features beside another row's embedding |
"""
