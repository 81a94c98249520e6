"""vLLM as an engine: ``KVMoveConnector`` (connector.py) in its processes, and a rank's process beside each worker.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVMoveConnector",
        "kv_connector_module_path": "kvreal.engines.vllm.connector", "kv_role": "kv_both"}'

``connector`` stands between vLLM and ``scheduler`` (in EngineCore) or ``worker`` (in each worker); these talk
(``link``) to the ranks' processes (``rank``, ``desk``). ``plan`` is what the scheduler tells the workers, ``blocks``
copies, ``space`` says what KV this is, ``tally`` and ``stats`` count, ``api`` looks at the installed vLLM.
"""
