//! The stack machine. It runs in time linear in the input, without recursion.

use super::PickleProblem;
use super::allow::{Dialect, is_allowed};
use super::node::{Id, Node, Object, Pickle, Run};

/// No `.metadata` of a real model comes near.
const MAX_LEN: u64 = 1 << 30;

/// Parses a pickle that ends where `input` ends.
///
/// # Errors
/// [`PickleProblem`] for the first thing that is off.
pub(crate) fn parse(input: &[u8], dialect: Dialect) -> Result<Pickle<'_>, PickleProblem> {
    if input.len() as u64 > MAX_LEN {
        return Err(PickleProblem::TooLong {
            len: input.len() as u64,
            limit: MAX_LEN,
        });
    }
    let machine = Machine {
        dialect,
        at: 0,
        instruction: 0,
        budget: input.len() * 16 + (32 << 10),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
        out: Pickle {
            input,
            ..Pickle::default()
        },
    };
    machine.run()
}

struct Machine<'a> {
    dialect: Dialect,
    /// The next byte.
    at: usize,
    /// Where the instruction that runs begins.
    instruction: usize,
    /// Bytes that may still be stored; the vectors' growth at most doubles them.
    budget: usize,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: Vec<Id>,
    out: Pickle<'a>,
}

type Step<T> = Result<T, PickleProblem>;

impl<'a> Machine<'a> {
    fn run(mut self) -> Step<Pickle<'a>> {
        loop {
            self.instruction = self.at;
            let opcode = self.bytes(1)?[0];
            if opcode == b'.' {
                break;
            }
            self.step(opcode)?;
        }
        let root = self.pop()?;
        if !self.stack.is_empty() || !self.marks.is_empty() {
            return Err(self.malformed("values are left over at the end"));
        }
        if self.at != self.out.input.len() {
            return Err(self.malformed("bytes follow the last instruction"));
        }
        self.out.root = Some(root);
        Ok(self.out)
    }

    fn step(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            // PROTO, FRAME: their operands change nothing.
            0x80 => self.bytes(1).map(drop),
            0x95 => self.bytes(8).map(drop),
            b'(' => {
                self.spend(size_of::<usize>())?;
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'K' => {
                let value = i64::from(self.bytes(1)?[0]);
                self.push(Node::Int(value))
            }
            b'M' => {
                let value = self.little_endian(2)?;
                self.push(Node::Int(value))
            }
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(i64::from(value)))
            }
            0x8a => self.long1(),
            b'G' => {
                let value = f64::from_be_bytes(self.array()?);
                self.push(Node::Float(value))
            }
            0x8c => self.text(1),
            b'X' => self.text(4),
            0x8d => self.text(8),
            b'C' => self.binary(1),
            b'B' => self.binary(4),
            b')' => self.tuple(0),
            0x85 => self.tuple(1),
            0x86 => self.tuple(2),
            0x87 => self.tuple(3),
            b't' => {
                let count = self.since_mark()?;
                self.tuple(count)
            }
            b']' => {
                self.spend(size_of::<Vec<Id>>())?;
                self.out.lists.push(Vec::new());
                self.push(Node::List(index(self.out.lists.len())))
            }
            b'}' => {
                self.spend(size_of::<Vec<(Id, Id)>>())?;
                self.out.dicts.push(Vec::new());
                self.push(Node::Dict(index(self.out.dicts.len())))
            }
            b'a' => self.append(1),
            b'e' => {
                let count = self.since_mark()?;
                self.append(count)
            }
            b's' => self.set_items(2),
            b'u' => {
                let count = self.since_mark()?;
                self.set_items(count)
            }
            b'c' => self.global(),
            0x93 => self.stack_global(),
            0x81 | b'R' => self.object(),
            b'b' => self.build(),
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id))
            }
            0x94 => self.remember(self.memo.len()),
            b'q' => {
                let slot = usize::from(self.bytes(1)?[0]);
                self.remember(slot)
            }
            b'r' => {
                let slot = self.length(4)?;
                self.remember(slot)
            }
            b'h' => {
                let slot = usize::from(self.bytes(1)?[0]);
                self.recall(slot)
            }
            b'j' => {
                let slot = self.length(4)?;
                self.recall(slot)
            }
            _ => Err(PickleProblem::Opcode {
                offset: self.instruction,
                opcode,
            }),
        }
    }

    fn malformed(&self, reason: &'static str) -> PickleProblem {
        PickleProblem::Malformed {
            offset: self.instruction,
            reason,
        }
    }

    fn spend(&mut self, bytes: usize) -> Step<()> {
        match self.budget.checked_sub(bytes) {
            Some(left) => {
                self.budget = left;
                Ok(())
            }
            None => Err(PickleProblem::Dense {
                len: self.out.input.len(),
            }),
        }
    }

    fn bytes(&mut self, count: usize) -> Step<&'a [u8]> {
        let rest = &self.out.input[self.at..];
        let bytes = rest.get(..count).ok_or(PickleProblem::Cut {
            offset: self.out.input.len(),
        })?;
        self.at += count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.bytes(N)?;
        Ok(bytes.try_into().expect("as many bytes as were asked for"))
    }

    /// A signed integer of up to 8 bytes; below 8, all are taken as unsigned.
    fn little_endian(&mut self, count: usize) -> Step<i64> {
        let mut bytes = [0; 8];
        bytes[..count].copy_from_slice(self.bytes(count)?);
        Ok(i64::from_le_bytes(bytes))
    }

    /// A length of 1, 4 or 8 bytes. One behind the end of memory is an end of the input too.
    fn length(&mut self, count: usize) -> Step<usize> {
        let value = self.little_endian(count)?;
        usize::try_from(value).map_err(|_| PickleProblem::Cut {
            offset: self.out.input.len(),
        })
    }

    fn run_of(&mut self, count: usize) -> Step<Run> {
        let start = self.at;
        self.bytes(count)?;
        Ok(Run {
            start: small(start),
            len: small(count),
        })
    }

    /// Takes a value. A mark is a floor: what lies below it belongs to somebody else.
    fn pop(&mut self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(self.malformed("an instruction takes a value that is not there"));
        }
        Ok(self.stack.pop().expect("the stack is above its floor"))
    }

    fn top(&self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(self.malformed("an instruction takes a value that is not there"));
        }
        Ok(*self.stack.last().expect("the stack is above its floor"))
    }

    fn push_id(&mut self, id: Id) -> Step<()> {
        self.spend(size_of::<Id>())?;
        self.stack.push(id);
        Ok(())
    }

    fn push(&mut self, node: Node) -> Step<()> {
        self.spend(size_of::<Node>())?;
        let id = Id(small(self.out.nodes.len()));
        self.out.nodes.push(node);
        self.push_id(id)
    }

    fn since_mark(&mut self) -> Step<usize> {
        let mark = self
            .marks
            .pop()
            .ok_or_else(|| self.malformed("there is no mark"))?;
        // `pop` never goes below a mark.
        Ok(self.stack.len() - mark)
    }

    /// The topmost `count` values, in the order they were pushed.
    fn take(&mut self, count: usize) -> Step<Vec<Id>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count) {
            Some(start) if start >= floor => Ok(self.stack.split_off(start)),
            _ => Err(self.malformed("an instruction takes a value that is not there")),
        }
    }

    fn long1(&mut self) -> Step<()> {
        let count = usize::from(self.bytes(1)?[0]);
        let bytes = self.bytes(count)?;
        if count > 8 {
            return self.push(Node::BigInt);
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut extended = [if negative { 0xff } else { 0 }; 8];
        extended[..count].copy_from_slice(bytes);
        self.push(Node::Int(i64::from_le_bytes(extended)))
    }

    fn text(&mut self, length_bytes: usize) -> Step<()> {
        let len = self.length(length_bytes)?;
        let run = self.run_of(len)?;
        if std::str::from_utf8(run.of(self.out.input)).is_err() {
            return Err(self.malformed("a text is not UTF-8"));
        }
        self.push(Node::Text(run))
    }

    fn binary(&mut self, length_bytes: usize) -> Step<()> {
        let len = self.length(length_bytes)?;
        let run = self.run_of(len)?;
        self.push(Node::Bytes(run))
    }

    fn tuple(&mut self, count: usize) -> Step<()> {
        self.spend(count * size_of::<Id>())?;
        let items = self.take(count)?;
        let start = small(self.out.tuples.len());
        self.out.tuples.extend(items);
        self.push(Node::Tuple(Run {
            start,
            len: small(count),
        }))
    }

    fn append(&mut self, count: usize) -> Step<()> {
        self.spend(count * size_of::<Id>())?;
        let items = self.take(count)?;
        let target = self.top()?;
        let Node::List(list) = self.out.node(target) else {
            return Err(self.malformed("items are appended to what is not a list"));
        };
        self.out.lists[list as usize].extend(items);
        Ok(())
    }

    fn set_items(&mut self, count: usize) -> Step<()> {
        self.spend(count * size_of::<Id>())?;
        let items = self.take(count)?;
        let target = self.top()?;
        let Node::Dict(dict) = self.out.node(target) else {
            return Err(self.malformed("entries are set in what is not a dict"));
        };
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(self.malformed("a key has no value"));
        }
        self.out.dicts[dict as usize].extend(pairs.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn line(&mut self) -> Step<Run> {
        let rest = &self.out.input[self.at..];
        let Some(len) = rest.iter().position(|byte| *byte == b'\n') else {
            return Err(PickleProblem::Cut {
                offset: self.out.input.len(),
            });
        };
        let run = self.run_of(len)?;
        self.bytes(1)?;
        if std::str::from_utf8(run.of(self.out.input)).is_err() {
            return Err(self.malformed("a name is not UTF-8"));
        }
        Ok(run)
    }

    fn global(&mut self) -> Step<()> {
        let module = self.line()?;
        let name = self.line()?;
        self.push_global(module, name)
    }

    fn stack_global(&mut self) -> Step<()> {
        let name = self.pop()?;
        let module = self.pop()?;
        match (self.out.node(module), self.out.node(name)) {
            (Node::Text(module), Node::Text(name)) => self.push_global(module, name),
            _ => Err(self.malformed("a class is not named by two texts")),
        }
    }

    fn push_global(&mut self, module: Run, name: Run) -> Step<()> {
        let (module_name, class_name) = (self.out.str_of(module), self.out.str_of(name));
        if !is_allowed(self.dialect, module_name, class_name) {
            return Err(PickleProblem::Global {
                offset: self.instruction,
                module: shortened(module_name),
                name: shortened(class_name),
            });
        }
        self.spend(size_of::<(Run, Run)>())?;
        self.out.globals.push((module, name));
        self.push(Node::Global(index(self.out.globals.len())))
    }

    /// NEWOBJ and REDUCE: class and arguments, kept and not called.
    fn object(&mut self) -> Step<()> {
        let args = self.pop()?;
        let class = self.pop()?;
        if !matches!(self.out.node(args), Node::Tuple(_)) {
            return Err(self.malformed("the arguments of a class are no tuple"));
        }
        if !matches!(self.out.node(class), Node::Global(_)) {
            return Err(self.malformed("an instance is made of what is not a named class"));
        }
        self.spend(size_of::<Object>())?;
        self.out.objects.push(Object {
            class,
            args,
            state: None,
        });
        self.push(Node::Object(index(self.out.objects.len())))
    }

    fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let target = self.top()?;
        let Node::Object(object) = self.out.node(target) else {
            return Err(self.malformed("a state is set on what is not an instance"));
        };
        let object = &mut self.out.objects[object as usize];
        if object.state.replace(state).is_some() {
            return Err(self.malformed("an instance gets a second state"));
        }
        Ok(())
    }

    /// Writers number what they remember in order, so that anything else is a forgery.
    fn remember(&mut self, slot: usize) -> Step<()> {
        let id = self.top()?;
        if slot < self.memo.len() {
            return Err(self.malformed("a memo entry is set twice"));
        }
        if slot > self.memo.len() {
            return Err(self.malformed("a memo entry is set out of order"));
        }
        self.spend(size_of::<Id>())?;
        self.memo.push(id);
        Ok(())
    }

    fn recall(&mut self, slot: usize) -> Step<()> {
        match self.memo.get(slot) {
            Some(id) => self.push_id(*id),
            None => Err(self.malformed("a memo entry is used that was never set")),
        }
    }
}

/// The index of the last entry of a table.
fn index(len: usize) -> u32 {
    small(len - 1)
}

fn small(value: usize) -> u32 {
    u32::try_from(value).expect("the input's length is limited to 30 bits")
}

/// A name for a message: whatever a hostile file holds, at most a line of it, without control characters.
fn shortened(name: &str) -> String {
    name.chars()
        .take(80)
        .map(|letter| if letter.is_control() { '?' } else { letter })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(input: &[u8]) -> Result<Pickle<'_>, PickleProblem> {
        parse(input, Dialect::Metadata)
    }

    #[test]
    fn names_off_the_list_are_refused_in_both_spellings() {
        for input in [
            b"cos\nsystem\nX\x02\0\0\0ls\x85R.".as_slice(),
            b"\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.",
            b"cbuiltins\neval\n.",
            b"ctorch\nload\n.",
            b"ctorch.distributed.checkpoint.metadata\nMetadata.__init__\n.",
        ] {
            for dialect in [Dialect::Metadata, Dialect::Tensor, Dialect::Common] {
                let error = parse(input, dialect).unwrap_err();
                assert!(matches!(error, PickleProblem::Global { .. }), "{error}");
            }
        }
    }

    #[test]
    fn instructions_off_the_list_are_refused_by_number_and_place() {
        // INST, OBJ, EXT1, EXT2, EXT4, LONG4 of 2 GB, DUP, POP, GET, PUT, PERSID, NEWOBJ_EX, BYTEARRAY8.
        for opcode in b"io\x82\x83\x84\x8b20gpP\x92\x96" {
            let input = [b'N', *opcode, 0xff, 0xff, 0xff, 0x7f, b'.'];
            let expected = PickleProblem::Opcode {
                offset: 1,
                opcode: *opcode,
            };
            assert_eq!(metadata(&input).unwrap_err(), expected);
        }
    }

    #[test]
    fn malformed_programs_are_errors_and_not_panics() {
        for input in [
            b".".as_slice(),
            b"t.",
            b"R.",
            b"NN.",
            b"(N.",
            b"N.N",
            b"Na.",
            b"NNa.",
            b"}(Nu.",
            b"}N(s.",
            b"]N(a.",
            b")N\x81.",
            b"N)\x81.",
            b"Nb.",
            b"NNb.",
            b"h\0.",
            b"Nq\x01.",
            b"Nq\0q\0.",
            b"Nr\xff\xff\xff\xff.",
            b"(q\0.",
            b"NN\x93.",
            b"X\x01\0\0\0\xff.",
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.",
            b"X\xff\xff\xff\xffa.",
            b"ctorch\nSize\n)\x81NbNb.",
        ] {
            assert!(metadata(input).is_err(), "{input:?}");
        }
    }

    #[test]
    fn numbers_are_exact() {
        for (input, value) in [
            (b"K\xff.".as_slice(), 255),
            (b"M\xff\xff.", 65_535),
            (b"J\xff\xff\xff\xff.", -1),
            (b"\x8a\0.", 0),
            (b"\x8a\x01\xff.", -1),
            (b"\x8a\x05\0\0\0\x80\0.", 1 << 31),
            (b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f.", i64::MAX),
        ] {
            let pickle = metadata(input).unwrap();
            assert_eq!(pickle.int(pickle.root()), Some(value));
        }
        let pickle = metadata(b"\x8a\x09\0\0\0\0\0\0\0\0\x01.").unwrap();
        assert_eq!(pickle.node(pickle.root()), Node::BigInt);
    }

    #[test]
    fn memory_stays_within_the_stated_multiple_of_the_input() {
        let many = 1 << 20;
        let nested = |opcode: &[u8]| [b"N".to_vec(), opcode.repeat(many), b".".to_vec()].concat();
        for input in [
            b"N".repeat(many),
            b"]".repeat(many),
            b"}".repeat(many),
            b"(".repeat(many),
            b")".repeat(many),
            nested(b"\x85"),
            nested(b"\x94h\0"),
            nested(b"Q"),
            [b"]\x94".to_vec(), b"h\0h\0a".repeat(many)].concat(),
            b"ctorch\nSize\n".repeat(many / 8),
            b"ctorch\nSize\n)\x81)R".repeat(many / 8),
        ] {
            let limit = input.len() * 32 + (64 << 10);
            if let Ok(pickle) = metadata(&input) {
                assert!(pickle.capacity_bytes() <= limit);
            }
        }
    }

    #[test]
    fn a_value_may_contain_itself() {
        let pickle = metadata(b"]q\0h\0a.").unwrap();
        assert_eq!(pickle.items(pickle.root()), Some(&[pickle.root()][..]));
    }
}
