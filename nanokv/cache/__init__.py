"""The cache: values, protocols, prefill and decode. Policies and stores are met through their interfaces alone."""
