//! Deltas: a newer package made from an older one and a few percent of its bytes.
//!
//! A package is cut into parts (`parts`): the `ar` archive's own bytes, and the members that unpack. A delta holds a patch
//! from the unpacked parts of the old package, one after the other, to those of the new one, and for each part the recipe by
//! which it is packed again to the very bytes that it had. One patch instead of one for each member: the archive's headers,
//! which differ by a few digits, then cost nothing, and no frame has a head of its own.
//!
//! ```text
//! "PFd2"           the form and its version
//! 8 bytes          the first of the old file's digest: a wrong base is told before anything is unpacked
//! 32 bytes         the new file's digest
//! number           bytes of the new file
//! byte             parts, 1 to 16
//!   recipe         0 stored | 1 preset check block_bytes | 2 level header_bytes header | 3 level flags version
//!   number         unpacked bytes of the part
//! the rest         one zstd frame with the unpacked old file as its prefix, with content size and checksum; in it:
//!   the unpacked new file, with what is nearly as in the old one as differences (`similar`)
//!   the commands that say which bytes these are
//! ```
//! A number has seven bits in each byte, the lowest first. The version stands also for how files are cut and for what the
//! encoders built into this program put out (xz 5.8, zlib 1.3): where one of these changes its output, the version changes.
//!
//! **A delta is input from a stranger.** What it asks for is bounded before it is done: recipes are a closed list, the window
//! is at most 2^27 bytes and the 4 MiB of commands, each unpacked file at most [`FLAT_BYTES_MAX`] and at most
//! [`FLAT_FACTOR_MAX`] times the package's size in its signed index, what is packed ends at that size. What comes out is right
//! only if its digest is. Memory is at most [`MEMORY_BYTES_MAX`]; time is for who runs this to bound, in a process of its own.

mod parts;
mod patch;
mod recipe;
mod similar;
#[cfg(test)]
mod tests;
mod unpack;

pub use recipe::Recipe;

use crate::digest::Digest;
use parts::{Flat, PARTS_MAX, Section, flatten};
use recipe::{candidates, put_number, take, take_number};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read as _, Write};

/// The most unpacked bytes of either file: what the largest window reaches.
pub const FLAT_BYTES_MAX: u64 = 1 << 27;

/// The most unpacked bytes for each byte of the package that is made.
pub const FLAT_FACTOR_MAX: u64 = 64;

/// The largest delta, in bytes.
pub const DELTA_BYTES_MAX: u64 = 64 << 20;

/// What making or applying a delta takes of memory at most, in bytes.
pub const MEMORY_BYTES_MAX: u64 = 480 << 20;

const MAGIC: &[u8; 4] = b"PFd2";

/// Bytes of the old file's digest that a delta carries.
const NAMED_BYTES: usize = 8;

/// Why there is no delta, or no file from one.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// A file could not be read.
    #[error("read: {0}")]
    Read(#[source] io::Error),
    /// The result could not be written, or there was no memory for it.
    #[error("write: {0}")]
    Write(#[source] io::Error),
    /// Not the form of a delta, or cut off.
    #[error("not a delta of a form that this poolfs knows, or cut off")]
    Form,
    /// It starts from another file, or makes another one.
    #[error("the delta is between two other files")]
    WrongBase,
    /// A recipe that is not in the list.
    #[error("the delta packs a member in a way that this poolfs does not know")]
    Recipe,
    /// A recipe that needs another version of a library than there is.
    #[error("{recipe} cannot be made on this machine, which has another libzstd")]
    Missing {
        /// The recipe.
        recipe: Recipe,
    },
    /// Something is, or would become, larger than may be.
    #[error("{what} is too large")]
    TooLarge {
        /// What.
        what: &'static str,
    },
    /// The patch is damaged, or for other bytes.
    #[error("the patch does not fit the old file")]
    Patch,
    /// What came out is not the new file.
    #[error("the delta does not make the new file")]
    Mismatch,
    /// A member of the new package is packed in a way that none of the recipes makes.
    #[error("part {part} of the new file cannot be packed again to the same bytes")]
    NotReproduced {
        /// Which part, from 0.
        part: usize,
    },
    /// The delta would be larger than it may be.
    #[error("the delta would have more than {max} bytes")]
    NotWorthIt {
        /// The most bytes that it may have.
        max: u64,
    },
}

impl DeltaError {
    /// Whether it is proof that the delta is false: every machine finds the same, whatever it has of memory, time and
    /// libraries. Whoever vouched for such a delta lied.
    pub fn is_proof(&self) -> bool {
        match self {
            Self::Form | Self::WrongBase | Self::Recipe | Self::TooLarge { .. } | Self::Patch | Self::Mismatch => true,
            Self::Read(_) | Self::Write(_) | Self::Missing { .. } | Self::NotReproduced { .. } | Self::NotWorthIt { .. } => false,
        }
    }
}

/// Between which files a delta is, as signed indexes name them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Between {
    /// The older file.
    pub old: Digest,
    /// The newer file.
    pub new: Digest,
    /// The newer file's length in bytes.
    pub new_bytes: u64,
}

impl Between {
    /// The most unpacked bytes of the newer file.
    fn flat_bytes_max(&self) -> u64 {
        self.new_bytes.saturating_mul(FLAT_FACTOR_MAX).min(FLAT_BYTES_MAX)
    }
}

/// A delta and how its parts are packed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Made {
    /// The delta's bytes.
    pub bytes: Vec<u8>,
    /// A recipe for each part: what is likely to fit the package's next version too.
    pub recipes: Vec<Recipe>,
}

/// How thoroughly recipes are looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Search {
    /// The likeliest of each part is taken unseen: who applies the delta sees whether it was right.
    Likeliest,
    /// Each is tried until one makes the part's bytes. Takes as long as packing the package, some times over.
    All,
}

/// Makes the delta from `old` to `new`, if it has at most `bytes_max` bytes. `known` are recipes that fitted the package's other versions.
///
/// The bytes depend on the two files only, and with [`Search::Likeliest`] on `known`. Nothing is checked: [`apply`] it.
///
/// # Errors
/// [`DeltaError::NotWorthIt`], [`DeltaError::NotReproduced`] and [`DeltaError::TooLarge`] are so for good.
pub fn make(old: &File, new: &File, between: &Between, known: &[Recipe], search: Search, bytes_max: u64) -> Result<Made, DeltaError> {
    let old = flatten(old)?;
    let mut flat = flatten(new)?;
    if flat.bytes.len() as u64 > between.flat_bytes_max() {
        return Err(DeltaError::TooLarge { what: "the unpacked package" });
    }
    let max = bytes_max.min(DELTA_BYTES_MAX);
    let not_worth_it = || DeltaError::NotWorthIt { max };
    let room = usize::try_from(max).map_err(|_| DeltaError::Form)?;
    let patch = patch::make(&old.bytes, &mut flat.bytes, room)?.ok_or_else(not_worth_it)?;
    drop(old);
    let recipes = recipes(new, &flat, known, search)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&between.old.0[..NAMED_BYTES]);
    bytes.extend_from_slice(&between.new.0);
    put_number(between.new_bytes, &mut bytes);
    bytes.push(u8::try_from(recipes.len()).map_err(|_| DeltaError::Form)?);
    for (recipe, (_, unpacked_bytes)) in recipes.iter().zip(&flat.parts) {
        recipe.encode(&mut bytes);
        put_number(*unpacked_bytes, &mut bytes);
    }
    bytes.extend_from_slice(&patch);
    if bytes.len() > room { Err(not_worth_it()) } else { Ok(Made { bytes, recipes }) }
}

/// A recipe for each part of `new`, whose unpacked parts are `flat`.
fn recipes(new: &File, flat: &Flat, known: &[Recipe], search: Search) -> Result<Vec<Recipe>, DeltaError> {
    let mut recipes = Vec::new();
    let mut at = 0;
    for (index, (part, unpacked_bytes)) in flat.parts.iter().enumerate() {
        let end = at + usize::try_from(*unpacked_bytes).map_err(|_| DeltaError::Form)?;
        let bytes = &flat.bytes[at..end];
        at = end;
        let Some(format) = part.format else {
            recipes.push(Recipe::Stored);
            continue;
        };
        let possible = candidates(format, Section::new(new, *part), *unpacked_bytes, known).map_err(DeltaError::Read)?;
        let found = match search {
            Search::Likeliest => possible.into_iter().next(),
            Search::All => possible.into_iter().find(|recipe| is_packed_so(recipe, bytes, Section::new(new, *part))),
        };
        recipes.push(found.ok_or(DeltaError::NotReproduced { part: index })?);
    }
    Ok(recipes)
}

/// Whether a recipe makes just what is in `packed`; ends at the first difference.
fn is_packed_so(recipe: &Recipe, bytes: &[u8], mut packed: Section<'_>) -> bool {
    let mut buffer = Vec::new();
    let compared = recipe.pack(bytes, &mut |made| {
        buffer.resize(made.len(), 0);
        packed.read_exact(&mut buffer)?;
        if buffer == made { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    });
    // A recipe that needs more memory than there is fails like one that does not fit.
    compared.is_ok() && matches!(packed.read(&mut [0]), Ok(0))
}

/// Makes the new file of `old` and a delta, and writes it to `out`.
///
/// What is written is right only if this returns without an error: then it has the new file's length and digest.
///
/// # Errors
/// [`DeltaError::is_proof`] tells which mean that the delta is false.
pub fn apply(old: &File, delta: impl AsRef<[u8]>, between: &Between, out: &mut impl Write) -> Result<(), DeltaError> {
    let (head, patch) = Head::read(delta.as_ref())?;
    if head.old != between.old.0[..NAMED_BYTES] || head.new != between.new || head.new_bytes != between.new_bytes {
        return Err(DeltaError::WrongBase);
    }
    let flat_bytes = head.parts.iter().try_fold(0_u64, |sum, (_, bytes)| sum.checked_add(*bytes)).ok_or(DeltaError::Form)?;
    if flat_bytes > between.flat_bytes_max() {
        return Err(DeltaError::TooLarge { what: "the unpacked package" });
    }
    let old = match flatten(old) {
        // The maker has had the same file: he could not unpack it either.
        Err(DeltaError::TooLarge { .. }) => return Err(DeltaError::TooLarge { what: "the unpacked old package" }),
        old => old?,
    };
    let flat = patch::apply(&old.bytes, patch, flat_bytes, between.flat_bytes_max())?;
    // The encoders need the room.
    drop((old, delta));
    let mut digest = Sha256::new();
    let mut written = 0_u64;
    let mut too_long = false;
    let mut sink = |bytes: &[u8]| {
        written += bytes.len() as u64;
        if written > between.new_bytes {
            too_long = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        digest.update(bytes);
        out.write_all(bytes)
    };
    let mut rest = &flat[..];
    let mut packed = Ok(());
    for (recipe, bytes) in &head.parts {
        let (part, after) = rest.split_at(usize::try_from(*bytes).map_err(|_| DeltaError::Form)?);
        rest = after;
        packed = recipe.pack(part, &mut sink);
        if packed.is_err() {
            break;
        }
    }
    let by_machine = head.parts.iter().any(|(recipe, _)| matches!(recipe, Recipe::Zstd { .. }));
    let wrong = || match by_machine {
        // Another build of the same version may differ: nobody is to blame for that.
        true => DeltaError::Write(io::Error::other("the machine's libzstd makes other bytes than the maker's")),
        false => DeltaError::Mismatch,
    };
    match packed {
        Err(_) if too_long => Err(wrong()),
        Err(err) => Err(err),
        Ok(()) if written != between.new_bytes || Digest(digest.finalize().into()) != between.new => Err(wrong()),
        Ok(()) => Ok(()),
    }
}

/// What a delta says before its patch.
struct Head {
    old: [u8; NAMED_BYTES],
    new: Digest,
    new_bytes: u64,
    parts: Vec<(Recipe, u64)>,
}

impl Head {
    /// The head, and the patch behind it.
    fn read(delta: &[u8]) -> Result<(Self, &[u8]), DeltaError> {
        if delta.len() as u64 > DELTA_BYTES_MAX {
            return Err(DeltaError::TooLarge { what: "the delta" });
        }
        let rest = delta.strip_prefix(MAGIC).ok_or(DeltaError::Form)?;
        let (old, rest) = rest.split_first_chunk().ok_or(DeltaError::Form)?;
        let (new, mut rest) = rest.split_first_chunk().ok_or(DeltaError::Form)?;
        let new_bytes = take_number(&mut rest)?;
        let count = usize::from(take(&mut rest)?);
        if !(1..=PARTS_MAX).contains(&count) {
            return Err(DeltaError::Form);
        }
        let part = |_| Ok((Recipe::decode(&mut rest)?, take_number(&mut rest)?));
        let parts = (0..count).map(part).collect::<Result<_, DeltaError>>()?;
        Ok((Self { old: *old, new: Digest(*new), new_bytes, parts }, rest))
    }
}

/// The recipes that a delta packs its parts by, for people and for the memory of what fitted a package.
///
/// # Errors
/// [`DeltaError::Form`], [`DeltaError::Recipe`].
pub fn recipes_of(delta: &[u8]) -> Result<Vec<Recipe>, DeltaError> {
    Ok(Head::read(delta)?.0.parts.into_iter().map(|(recipe, _)| recipe).collect())
}

/// Digest and length of the file that a delta says it makes.
///
/// # Errors
/// [`DeltaError::Form`], [`DeltaError::Recipe`].
pub fn target_of(delta: &[u8]) -> Result<(Digest, u64), DeltaError> {
    let (head, _) = Head::read(delta)?;
    Ok((head.new, head.new_bytes))
}

/// Loads what of the machine's libraries is of use, for a process that will not be allowed to afterwards.
pub fn load_libraries() {
    // Where there is none, recipes that need it fail.
    let _ = crate::sys::MachineZstd::find();
}

/// Writes recipes down, to be remembered; [`read_recipes`] reads them.
pub fn write_recipes(recipes: &[Recipe]) -> Vec<u8> {
    let mut bytes = Vec::new();
    recipes.iter().for_each(|recipe| recipe.encode(&mut bytes));
    bytes
}

/// Reads what [`write_recipes`] wrote; recipes of another version are left out.
pub fn read_recipes(mut bytes: &[u8]) -> Vec<Recipe> {
    std::iter::from_fn(|| if bytes.is_empty() { None } else { Recipe::decode(&mut bytes).ok() }).take(PARTS_MAX).collect()
}
