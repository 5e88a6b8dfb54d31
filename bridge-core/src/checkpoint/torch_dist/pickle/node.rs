//! What a pickle holds.

/// A value of a pickle. Values are shared where the pickle shares them, and may contain themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Id(pub(super) u32);

/// A run of bytes of the input, or of entries of a table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Run {
    pub(super) start: u32,
    pub(super) len: u32,
}

impl Run {
    pub(super) fn of<T>(self, table: &[T]) -> &[T] {
        &table[self.start as usize..][..self.len as usize]
    }
}

/// The kinds of values. Those of variable size are looked up through [`Pickle`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Node {
    None,
    Bool(bool),
    Int(i64),
    /// An integer outside of 64 bits.
    BigInt,
    Float(f64),
    /// Bytes of the input that are UTF-8.
    Text(Run),
    Bytes(Run),
    Tuple(Run),
    List(u32),
    Dict(u32),
    /// A name on the list.
    Global(u32),
    /// What stands for a storage.
    Persistent(Id),
    Object(u32),
}

/// An instance: the class or function, what it would be called with, and the state that would be set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Object {
    pub(crate) class: Id,
    pub(crate) args: Id,
    pub(crate) state: Option<Id>,
}

/// A parsed pickle.
#[derive(Debug, Default)]
pub(crate) struct Pickle<'a> {
    pub(super) input: &'a [u8],
    pub(super) nodes: Vec<Node>,
    pub(super) tuples: Vec<Id>,
    pub(super) lists: Vec<Vec<Id>>,
    pub(super) dicts: Vec<Vec<(Id, Id)>>,
    pub(super) globals: Vec<(Run, Run)>,
    pub(super) objects: Vec<Object>,
    pub(super) root: Option<Id>,
}

impl<'a> Pickle<'a> {
    /// The outermost value.
    pub(crate) fn root(&self) -> Id {
        self.root.expect("a pickle that parsed has a root")
    }

    pub(crate) fn node(&self, id: Id) -> Node {
        self.nodes[id.0 as usize]
    }

    pub(super) fn str_of(&self, run: Run) -> &'a str {
        std::str::from_utf8(run.of(self.input)).expect("texts were checked when they were read")
    }

    pub(crate) fn text(&self, id: Id) -> Option<&'a str> {
        match self.node(id) {
            Node::Text(run) => Some(self.str_of(run)),
            _ => None,
        }
    }

    pub(crate) fn int(&self, id: Id) -> Option<i64> {
        match self.node(id) {
            Node::Int(value) => Some(value),
            _ => None,
        }
    }

    /// The items of a tuple or list.
    pub(crate) fn items(&self, id: Id) -> Option<&[Id]> {
        match self.node(id) {
            Node::Tuple(run) => Some(run.of(&self.tuples)),
            Node::List(list) => Some(&self.lists[list as usize]),
            _ => None,
        }
    }

    /// The entries of a dict, in the order they were set.
    pub(crate) fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.node(id) {
            Node::Dict(dict) => Some(&self.dicts[dict as usize]),
            _ => None,
        }
    }

    /// The value of a text key of a dict; the last one, as Python has it.
    pub(crate) fn get(&self, id: Id, key: &str) -> Option<Id> {
        let entries = self.dict(id)?;
        let (_, value) = entries
            .iter()
            .rev()
            .find(|(name, _)| self.text(*name) == Some(key))?;
        Some(*value)
    }

    pub(crate) fn object(&self, id: Id) -> Option<Object> {
        match self.node(id) {
            Node::Object(object) => Some(self.objects[object as usize]),
            _ => None,
        }
    }

    /// Module and name.
    pub(crate) fn global(&self, id: Id) -> Option<(&'a str, &'a str)> {
        match self.node(id) {
            Node::Global(global) => {
                let (module, name) = self.globals[global as usize];
                Some((self.str_of(module), self.str_of(name)))
            }
            _ => None,
        }
    }

    /// The instance with this id, if its class has this name in one of `modules`.
    pub(crate) fn instance(&self, id: Id, modules: &[&str], class: &str) -> Option<Object> {
        let object = self.object(id)?;
        let (module, name) = self.global(object.class)?;
        (name == class && modules.contains(&module)).then_some(object)
    }

    /// Bytes of memory that the values take.
    #[cfg(test)]
    pub(super) fn capacity_bytes(&self) -> usize {
        let flat = self.nodes.capacity() * size_of::<Node>()
            + self.tuples.capacity() * size_of::<Id>()
            + self.lists.capacity() * size_of::<Vec<Id>>()
            + self.dicts.capacity() * size_of::<Vec<(Id, Id)>>()
            + self.globals.capacity() * size_of::<(Run, Run)>()
            + self.objects.capacity() * size_of::<Object>();
        let lists: usize = self.lists.iter().map(Vec::capacity).sum();
        let dicts: usize = self.dicts.iter().map(Vec::capacity).sum();
        flat + lists * size_of::<Id>() + dicts * size_of::<(Id, Id)>()
    }
}
