//! Pickles of protocol 2, without a memo: each value is spelled out, as the smallest readers need it.

/// Appends instructions to a buffer.
#[derive(Debug)]
pub(crate) struct PickleWriter {
    bytes: Vec<u8>,
}

impl PickleWriter {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![0x80, 2],
        }
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.op(b'.');
        self.bytes
    }

    fn op(&mut self, opcode: u8) {
        self.bytes.push(opcode);
    }

    pub(crate) fn none(&mut self) {
        self.op(b'N');
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.op(if value { 0x88 } else { 0x89 });
    }

    pub(crate) fn int(&mut self, value: u64) {
        if let Ok(value) = u8::try_from(value) {
            self.bytes.extend([b'K', value]);
        } else if let Ok(value) = u16::try_from(value) {
            self.op(b'M');
            self.bytes.extend(value.to_le_bytes());
        } else if let Ok(value) = i32::try_from(value) {
            self.op(b'J');
            self.bytes.extend(value.to_le_bytes());
        } else {
            // Nine bytes keep the sign bit of what is above i64::MAX clear.
            let value = i128::from(value).to_le_bytes();
            let len = if value[7] & 0x80 == 0 { 8 } else { 9 };
            self.bytes.extend([0x8a, len]);
            self.bytes.extend(&value[..usize::from(len)]);
        }
    }

    pub(crate) fn float(&mut self, value: f64) {
        self.op(b'G');
        self.bytes.extend(value.to_be_bytes());
    }

    pub(crate) fn text(&mut self, text: &str) {
        let len = u32::try_from(text.len()).expect("names are shorter than 4 GiB");
        self.op(b'X');
        self.bytes.extend(len.to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }

    pub(crate) fn global(&mut self, module: &str, name: &str) {
        self.op(b'c');
        for part in [module, name] {
            self.bytes.extend(part.as_bytes());
            self.op(b'\n');
        }
    }

    /// A tuple of what `items` writes.
    pub(crate) fn tuple(&mut self, items: impl FnOnce(&mut Self)) {
        self.op(b'(');
        items(self);
        self.op(b't');
    }

    pub(crate) fn list(&mut self, items: impl FnOnce(&mut Self)) {
        self.op(b']');
        self.op(b'(');
        items(self);
        self.op(b'e');
    }

    /// A dict of the keys and values that `entries` writes in turn.
    pub(crate) fn dict(&mut self, entries: impl FnOnce(&mut Self)) {
        self.op(b'}');
        self.op(b'(');
        entries(self);
        self.op(b'u');
    }

    /// A call of a function with one argument.
    pub(crate) fn reduce(&mut self, module: &str, name: &str, argument: impl FnOnce(&mut Self)) {
        self.global(module, name);
        argument(self);
        self.op(0x85);
        self.op(b'R');
    }

    /// A call of a function with a tuple of arguments.
    pub(crate) fn call(&mut self, module: &str, name: &str, arguments: impl FnOnce(&mut Self)) {
        self.global(module, name);
        self.tuple(arguments);
        self.op(b'R');
    }

    /// An instance without a state.
    pub(crate) fn instance(&mut self, module: &str, name: &str) {
        self.global(module, name);
        self.op(b')');
        self.op(0x81);
    }

    /// An instance with the state that `state` writes.
    pub(crate) fn built(&mut self, module: &str, name: &str, state: impl FnOnce(&mut Self)) {
        self.instance(module, name);
        state(self);
        self.op(b'b');
    }

    /// A function called with nothing.
    pub(crate) fn call_empty(&mut self, module: &str, name: &str) {
        self.global(module, name);
        self.op(b')');
        self.op(b'R');
    }

    /// What `id` writes, as a persistent id.
    pub(crate) fn persistent(&mut self, id: impl FnOnce(&mut Self)) {
        id(self);
        self.op(b'Q');
    }
}
